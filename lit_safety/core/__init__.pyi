"""What everything rests on: errors, chance, categories, files, hashes, tables, one HTTP client, images."""

from .categories import CATEGORIES as CATEGORIES
from .categories import canonical_category as canonical_category
from .errors import UserError as UserError

__all__ = ["CATEGORIES", "UserError", "canonical_category"]
