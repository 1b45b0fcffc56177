from pathlib import Path

import pytest

from lit_safety.core.errors import UserError
from lit_safety.users.profiles import COLUMNS, read_profiles, write_profiles

SAGE = Path(__file__).parent / "sage_profiles.csv"
ROW = {
    "User_ID": "anna", "Age": "18", "Age_Group": "adolescents", "Gender": "female", "Religion": "None",
    "Physical_Condition": "healthy", "Mental_Condition": "healthy", "Banned_Categories": "['Sexuality']",
    "Allowed_Categories": "['Hate']", "Split": "seen",
}  # fmt: skip


def table(folder: Path, *rows: dict[str, str]) -> Path:
    names = list(rows[0])
    lines = [",".join(names)] + [",".join('"' + row[name].replace('"', '""') + '"' for name in names) for row in rows]
    path = folder / "users.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_table_of_ours_is_read_and_written_alike(tmp_path: Path) -> None:
    path = table(tmp_path, ROW, {**ROW, "User_ID": "ben", "Split": "unseen", "Banned_Categories": "[]"})
    found = read_profiles(tmp_path)
    assert list(found) == ["anna", "ben"]
    anna = found["anna"]
    assert (anna.age, anna.age_group, anna.religion, anna.split) == (18, "adolescents", "None", "seen")
    assert (anna.banned, anna.allowed) == (("sexual",), ("hate",))
    assert found["ben"].banned == ()
    write_profiles(path, found.values())
    assert read_profiles(path) == found
    assert path.read_text().splitlines()[0] == ",".join(["User_ID", *COLUMNS, "Split"])


def test_a_published_table_numbers_its_users_and_keeps_none_a_text() -> None:
    """The n-th row is user n, in seven digits; religion "None" is a text as any other."""
    found = read_profiles(SAGE)
    assert list(found)[:2] == ["0000001", "0000002"]
    assert {one.religion for one in found.values()} == {"None", "Christianity", "Islam", "Buddhism"}
    assert all(len(one.banned) + len(one.allowed) == 7 and one.split == "" for one in found.values())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"Religion": "nan"}, r"Religion is missing \('nan'\); write \"None\" for no religion"),
        ({"Religion": ""}, r"Religion is missing \(''\)"),
        ({"Age": "nan"}, "Age is 'nan', not a whole number"),
        ({"Age": "old"}, "Age is 'old', not a number of years"),
        ({"Age": "inf"}, "Age is 'inf', not a whole number"),
        ({"Mental_Condition": "NaN"}, "Mental_Condition is missing"),
        ({"Gender": "x" * 2000}, "Gender is over 1000 characters"),
        ({"Banned_Categories": "['Fun']"}, "Banned_Categories: unknown category 'Fun'"),
        ({"Allowed_Categories": "nan"}, "Allowed_Categories: 'nan' is not a list of categories"),
        ({"Banned_Categories": "__import__('os').getcwd()"}, ".* is not a list of categories"),
        ({"Banned_Categories": "['Hate']"}, "'hate' is both banned and allowed"),
        ({"Split": "tomorrow"}, "Split is 'tomorrow'; known are train"),
    ],
)
def test_a_wrong_value_names_row_and_user(tmp_path: Path, change: dict[str, str], complaint: str) -> None:
    path = table(tmp_path, ROW, {**ROW, "User_ID": "ben", **change})
    with pytest.raises(UserError, match=rf"users\.csv: row 3: user 'ben': {complaint}"):
        read_profiles(path)


def test_a_user_without_id_or_twice_or_nobody_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 3: user 'anna': is in the table twice"):
        read_profiles(table(tmp_path, ROW, ROW))
    with pytest.raises(UserError, match="row 2: user 'nan': is not a user id"):
        read_profiles(table(tmp_path, {**ROW, "User_ID": "nan"}))
    (tmp_path / "users.csv").write_text(",".join(ROW) + "\n")
    with pytest.raises(UserError, match="0 users"):
        read_profiles(tmp_path)
    with pytest.raises(UserError, match="has no column 'Age'"):
        read_profiles(table(tmp_path, {"User_ID": "anna"}))
