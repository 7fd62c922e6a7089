"""The protocol of draft heads, and the layers they share."""
