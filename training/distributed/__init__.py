"""DDP, FSDP2 and ZeRO."""
