"""The application: commands, training, evaluation, prediction and pages. The library does without it."""
