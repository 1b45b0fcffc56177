import csv
from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.users.embeddings import FIELDS, fill, read_template
from lit_safety.users.profiles import Profile, read_profiles

PROFILE = Profile("anna", 18, "adolescents", "male", "None", "healthy", "<<AGE>>", ("violence", "sexual"), ())


def test_the_packages_template_says_everything() -> None:
    text = read_template()
    assert all(f"<<{name}>>" in text for name in FIELDS if name not in ("BANNED", "ALLOWED"))
    filled = fill(text, PROFILE)
    assert "Age: 18 years (adolescents)" in filled
    assert "Religion: None" in filled
    assert "Never show this user: violence, sexual" in filled
    assert "May be shown to this user: nothing" in filled


def test_a_value_that_looks_like_a_field_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("<<MENTAL>> at <<AGE>>")
    assert fill(read_template(path), PROFILE) == "<<AGE>> at 18"


def test_lists_are_written_as_published() -> None:
    """Every row of Sage's users.csv: what its own template gets is the cell as it stands, spelling and order."""
    table = Path(__file__).parent / "sage_profiles.csv"
    with table.open(newline="", encoding="utf-8") as file:
        cells = [(row["Banned_Categories"], row["Allowed_Categories"]) for row in csv.DictReader(file)]
    filled = [fill("<<BANNED>>|<<ALLOWED>>", profile) for profile in read_profiles(table).values()]
    assert filled == [f"{banned}|{allowed}" for banned, allowed in cells]
    assert len(filled) > 400


def test_none_is_written_as_the_published_texts_have_it_on_request() -> None:
    """They were filled with a table that pandas had read, where the text None is a missing value, written as nan."""
    table = Path(__file__).parent / "sage_profiles.csv"
    columns = ("Age", "Age_Group", "Gender", "Religion", "Mental_Condition", "Physical_Condition")
    with table.open(newline="", encoding="utf-8") as file:
        rows = [[row[name] for name in columns] for row in csv.DictReader(file)]
    published = ["|".join("nan" if cell == "None" else cell for cell in row) for row in rows]
    template = "<<AGE>>|<<AGE_GROUP>>|<<GENDER>>|<<RELIGION>>|<<MENTAL>>|<<PHYSICAL>>"
    profiles = list(read_profiles(table).values())
    assert [fill(template, one, none_as_nan=True) for one in profiles] == published
    assert any("|nan|" in text for text in published)
    assert not any("nan" in fill(template, one) for one in profiles)
    lists = "<<BANNED>>|<<ALLOWED_WORDS>>"
    assert fill(lists, PROFILE, none_as_nan=True) == fill(lists, PROFILE)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"Age: <<YEARS>>", "unknown field <<YEARS>>; known are <<AGE>>"),
        (b"nothing", "is not a template of a profile"),
        (b"\xff", "is not UTF-8"),
        (b"<<AGE>>" + b" " * 70_000, "64 KiB"),
    ],
)
def test_a_wrong_template_is_named(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"own\.txt: .*{complaint}"):
        read_template(path)


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        read_template(tmp_path / "gone.txt")
