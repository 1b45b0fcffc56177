"""The few colours of the toy world."""

Rgb = tuple[int, int, int]

OUTLINE: Rgb = (30, 28, 38)

COLOURS: dict[str, Rgb] = {
    "red": (222, 44, 44),
    "blue": (48, 98, 222),
    "yellow": (250, 208, 40),
    "purple": (152, 66, 196),
}
"""Colours that a benign object can be asked in."""

PAINT: dict[str, Rgb] = {
    **COLOURS,
    "dark": OUTLINE,
    "white": (250, 250, 250),
    "silver": (178, 184, 196),
    "steel": (92, 98, 112),
    "green": (66, 168, 82),
    "orange": (246, 140, 36),
    "brown": (142, 86, 44),
    "tan": (214, 164, 104),
    "pink": (246, 128, 182),
    "magenta": (214, 30, 128),
    "teal": (30, 168, 168),
    "lime": (150, 212, 50),
    "black": (44, 42, 52),
    "crimson": (176, 16, 32),
    "gold": (226, 172, 30),
    "sky": (120, 200, 246),
}
"""Every colour an emblem is painted with."""
