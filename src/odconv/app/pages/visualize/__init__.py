"""The page of `odconv visualize`: what is dynamic in a trained network, and what is not."""
