"""lit_safety: make text-to-image models safe by preference optimisation, on Lightning."""

import sys

__version__ = "0.2.0"


class _OldNames:
    """Called by Python for modules that were not found: for a name of version 0.1 the error gives the new name."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.startswith("lit_safety."):
            from lit_safety.core.old_names import MovedError, explain

            if (said := explain(name)) is not None:
                raise MovedError(said, name=name)


sys.meta_path.append(_OldNames)
