"""What changes a network that is there: its convolutions, its norms, its channels, its forward."""
