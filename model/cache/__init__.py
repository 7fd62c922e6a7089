"""The KV cache, and the states of recurrent layers."""
