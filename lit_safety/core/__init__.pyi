"""What everything rests on: errors, chance, categories, files, hashes, tables, one HTTP client, images."""

from .categories import CATEGORIES as CATEGORIES
from .categories import canonical_category as canonical_category
from .chance import normal as normal
from .chance import uniform as uniform
from .errors import UserError as UserError

__all__ = ["CATEGORIES", "UserError", "canonical_category", "normal", "uniform"]
