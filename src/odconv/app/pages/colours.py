"""The colours of all pictures."""

INK, FAINT, GRID = "#222222", "#888888", "#E5E5E5"
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")  # Paul Tol's, for every eye
MARKERS = "os^D"
GATES = "viridis"
LEAST_RANGE = 0.1  # of a colour scale: what varies less shall look alike
MORE, LESS = "#EE7733", "#0077BB"  # of what lies above and below a mean, which itself is blank
