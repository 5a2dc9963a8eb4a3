"""Commands that need no room of their own."""
