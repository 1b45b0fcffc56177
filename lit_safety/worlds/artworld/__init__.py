"""The art world: real icons of six design teams under their real names, in a Stable-Diffusion-shaped pipeline.

Its public names, listed in `__init__.pyi`, are imported when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
