"""LlavaGuard and ShieldGemma 2, as tiny random models of their classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.judges.guard_models import OF_LLAVAGUARD, LlavaGuard, ShieldGemma2, read_rating
from lit_safety.judges.judge import JudgeError, Verdict
from lit_safety.judges.load import load_judge

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<video>", "<start_of_image>", "<end_of_image>",
           "<image_soft_token>"]  # fmt: skip
WORDS = ["Yes", "No", "policy", "no", "gore", "is", "this", "{", "}"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def tokenizer(images: dict[str, str]):
    """A tokenizer of whole words with the special tokens that the processors look for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        extra_special_tokens=images,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shieldgemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ShieldGemma2Config, ShieldGemma2ForImageClassification
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.shieldgemma2.processing_shieldgemma2 import ShieldGemma2Processor

    folder = tmp_path_factory.mktemp("shieldgemma") / "tiny"
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ShieldGemma2Config(
        text_config={**small, "vocab_size": 24, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 64,
                     "max_position_embeddings": 128},
        vision_config={**small, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4, boi_token_index=6, eoi_token_index=7, image_token_index=8,
    )  # fmt: skip
    config.yes_token_index, config.no_token_index = SPECIAL.index("<image_soft_token>") + 1, len(SPECIAL) + 1
    torch.manual_seed(0)
    model = ShieldGemma2ForImageClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    ShieldGemma2Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), tokenizer(images), image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def llavaguard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    folder = tmp_path_factory.mktemp("llavaguard") / "tiny"
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config={**small, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8,
                       "vision_use_head": False},
        text_config={**small, "model_type": "qwen2", "vocab_size": 24, "num_key_value_heads": 1,
                     "max_position_embeddings": 4096},
        image_token_index=4, video_token_index=5, image_grid_pinpoints=[[16, 16], [16, 32]],
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    words = tokenizer({"image_token": "<image>", "video_token": "<video>"})
    words.chat_template = TEMPLATE.replace("IMAGE", "<image>")
    words.save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32]]
    ).save_pretrained(folder)
    about = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 4, "image_token": "<image>",
             "vision_feature_select_strategy": "full", "video_token": "<video>"}  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(about))
    return folder


def images(count: int = 3) -> list[Image.Image]:
    return [Image.new("RGB", (20 + i, 16), (40 * i, 90, 200 - 30 * i)) for i in range(count)]


def test_shieldgemma_says_yes_and_no_of_each_policy(shieldgemma: Path) -> None:
    """The probability is that of Yes, the first token; each category has its own policy."""
    judge = ShieldGemma2(str(shieldgemma), dtype="float32", device="cpu", batch_size=2)
    verdicts = judge.judge(images())
    assert all(isinstance(one, Verdict) for one in verdicts)
    assert set(verdicts[0].categories) == {"sexual", "violence", "illegal-activity"}
    inputs = judge.local.inputs(images=images(1), policies=["a"], custom_policies={"a": judge.policies["violence"]})
    with torch.inference_mode():
        yes, no = judge.local.model(**inputs).logits[0].tolist()
    assert verdicts[0].categories["violence"] == pytest.approx(1 / (1 + 2.718281828459045 ** (no - yes)), abs=1e-4)
    alone = judge.judge(images(1))[0]
    assert alone.categories == pytest.approx(verdicts[0].categories, abs=1e-4)
    assert "dangerous" not in str(judge.settings["categories"])


def test_shieldgemma_s_policy_is_a_setting_and_so_is_its_threshold(shieldgemma: Path) -> None:
    own = ShieldGemma2(str(shieldgemma), {"Shocking": "no gore"}, dtype="float32", device="cpu")
    assert own.settings["categories"] == ["shocking"]
    assert own.settings["policies"] == {"shocking": "no gore"}
    share = own.judge(images(1))[0].categories["shocking"]
    for threshold, harmful in ((share / 2, True), ((1 + share) / 2, False)):
        judge = ShieldGemma2(str(shieldgemma), {"shocking": "no gore"}, threshold, "float32", "cpu")
        assert judge.judge(images(1))[0].harmful is harmful
    assert own.verdict([float("nan")]) == JudgeError("ShieldGemma 2 returned numbers that are not finite")


def test_llavaguard_is_asked_and_what_is_no_answer_is_an_error(llavaguard: Path, tmp_path: Path) -> None:
    """Random weights answer nonsense: an error for each image, never safe."""
    policy = tmp_path / "policy.txt"
    policy.write_text("is this gore policy")
    judge = LlavaGuard(str(llavaguard), str(policy), "float32", "cpu", max_new_tokens=4, batch_size=2)
    verdicts = judge.judge(images())
    assert [isinstance(one, JudgeError) for one in verdicts] == [True] * 3
    other = LlavaGuard(str(llavaguard), None, "float32", "cpu")
    assert other.settings["policy_sha256"] != judge.settings["policy_sha256"]
    assert "propaganda" not in judge.settings["categories"]


def test_llavaguard_s_answers_become_verdicts(llavaguard: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "p.txt").write_text("policy")
    judge = LlavaGuard(str(llavaguard), str(tmp_path / "p.txt"), "float32", "cpu", batch_size=2)
    said = ['{"rating": "Unsafe", "category": "O3: Sexual Content", "rat', '{"rating": "Safe", "category": "NA: None']
    monkeypatch.setattr(judge, "_texts", lambda part: [said[i % 2] + '"' * (i % 2) for i in range(len(part))])
    first, second, third = judge.judge(images())
    assert (first.harmful, first.present) == (True, {"sexual"})
    assert (second.harmful, second.categories) == (False, {})
    assert third == first


@pytest.mark.parametrize(
    ("answer", "harmful", "categories"),
    [
        ('{\n  "rating": "Unsafe",\n  "category": "O1: Hate, Humiliation, Harassment"', True, {"hate", "harassment"}),
        ('```json\n{"rating": "Unsafe", "category": "O7: Self-Harm"}', True, {"self-harm"}),
        ('{"rating": "Safe", "category": "O2: Violence"', False, set()),
        ('{"rating": "Unsafe", "category": "NA: None applying"}', True, set()),
    ],
)
def test_ratings(answer: str, harmful: bool, categories: set[str]) -> None:
    verdict = read_rating(answer)
    assert isinstance(verdict, Verdict)
    assert (verdict.harmful, set(verdict.categories)) == (harmful, categories)


@pytest.mark.parametrize(
    "answer",
    ["", "Safe", '{"rating": "safe"}', '{"rating": "Maybe", "category": "O1"}', '{"rating": "Safe", "category": "O12"}',
     'It is {"rating": "Safe", "category": "NA"}', '{"category": "NA", "rating": "Safe"}'],
)  # fmt: skip
def test_what_is_no_rating_is_an_error(answer: str) -> None:
    assert isinstance(read_rating(answer), JudgeError)


def test_what_does_not_fit_is_named(shieldgemma: Path, tmp_path: Path) -> None:
    given = {"dtype": "float32", "device": "cpu"}
    for wrong, says in (
        ({"threshold": 1.0}, "threshold"), ({"policies": {}}, "policies"), ({"policies": {"sexual": " "}}, "sexual"),
        ({"policies": {"sexual": "a", "nudity": "b"}}, "sexual twice"), ({"dtype": "int8"}, "dtype"),
        ({"policies": {"rudeness": "a"}}, "rudeness"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            ShieldGemma2(str(shieldgemma), **(given | wrong))
    with pytest.raises(UserError, match="no such folder"):
        LlavaGuard(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="does not load"):
        ShieldGemma2(str(_broken(tmp_path)), **given)
    assert {c for own in OF_LLAVAGUARD.values() for c in own} == {
        "hate", "harassment", "violence", "sexual", "illegal-activity", "self-harm", "shocking",
    }  # fmt: skip


def _broken(folder: Path) -> Path:
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "shieldgemma2"}')
    return folder / "broken"


def test_a_file_describes_them(shieldgemma: Path, tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    file.write_text(
        "class_path: lit_safety.judges.ShieldGemma2\n"
        f"init_args: {{model: {shieldgemma}, dtype: float32, device: cpu}}\n"
    )
    assert load_judge(str(file)).name == "ShieldGemma 2/tiny"
