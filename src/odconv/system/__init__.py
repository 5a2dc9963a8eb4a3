"""Files, packages, devices and text: what every part of the library stands on."""
