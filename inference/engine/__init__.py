"""The decode loop and its parts."""
