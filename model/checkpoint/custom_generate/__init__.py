"""What a fused folder brings along for programs that do not have Headstart."""
