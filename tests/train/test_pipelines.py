"""transformers' pipelines with adapters that `veneer train` left: the answers of `veneer predict`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from test_predict import invoke, trained  # noqa: F401  (a fixture)
from transformers import AutoTokenizer, pipeline

import veneer

TEXT = "anna in rome"
CLASSES = {
    "token-cls": veneer.AutoPeftModelForTokenClassification,
    "seq-cls": veneer.AutoPeftModelForSequenceClassification,
    "causal-lm": veneer.AutoPeftModelForCausalLM,
    "embedding": veneer.AutoPeftModelForFeatureExtraction,
    "masked-lm": veneer.AutoPeftModel,
    "seq2seq": veneer.AutoPeftModelForSeq2SeqLM,
}
KINDS = {"token-cls": "token-classification", "seq-cls": "text-classification", "causal-lm": "text-generation",
         "embedding": "feature-extraction", "masked-lm": "fill-mask"}  # fmt: skip


def pipe_of(result: Any, merged: bool = False) -> Any:
    """A pipeline of the adapter's folder alone, or of the merged model's."""
    kind = KINDS[result.task]
    if merged:
        return pipeline(kind, model=result.merged_dir, device="cpu")
    model = CLASSES[result.task].from_pretrained(result.adapter_dir).eval()
    return pipeline(kind, model=model, tokenizer=AutoTokenizer.from_pretrained(result.adapter_dir), device="cpu")


def predicted(result: Any, *words: object) -> Any:
    return json.loads(invoke("predict", result.adapter_dir, "-t", TEXT, *words))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("trained", ["token-cls"], indirect=True)
def test_token_classification(trained: Any, merged: bool) -> None:  # noqa: F811
    result, _ = trained
    found = pipe_of(result, merged)(TEXT, aggregation_strategy="first")
    spans = [(TEXT[e["start"] : e["end"]], e["entity_group"]) for e in found]
    assert spans == [(e["text"], e["label"]) for e in predicted(result)["entities"]]
    words = {word["entity"] for word in pipe_of(result, merged)(TEXT, ignore_labels=[])}
    assert words <= {"O", "B-per", "B-loc"}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("trained", ["seq-cls"], indirect=True)
def test_text_classification(trained: Any, merged: bool) -> None:  # noqa: F811
    result, _ = trained
    [found] = pipe_of(result, merged)(TEXT, top_k=1)
    wanted = predicted(result)
    assert found["label"] == wanted["label"]
    assert found["score"] == pytest.approx(wanted["score"], rel=1e-4)


@pytest.mark.parametrize("trained", ["causal-lm"], indirect=True)
def test_text_generation(trained: Any) -> None:  # noqa: F811
    result, _ = trained
    prompt = [{"role": "user", "content": "colour 1"}]
    [found] = pipe_of(result)(prompt, max_new_tokens=6, do_sample=False)
    written = found["generated_text"][-1]["content"].strip()
    line = invoke("generate", result.adapter_dir, "--prompt", "colour 1", "--max-new-tokens", 6)
    assert written == line.strip()


@pytest.mark.parametrize("trained", ["embedding"], indirect=True)
def test_feature_extraction(trained: Any) -> None:  # noqa: F811
    result, _ = trained
    [rows] = pipe_of(result)(TEXT)
    first = rows[0]  # its pooling is `cls`
    length = sum(value * value for value in first) ** 0.5
    assert [value / length for value in first] == pytest.approx(predicted(result)["embedding"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("trained", ["masked-lm"], indirect=True)
def test_fill_mask(trained: Any) -> None:  # noqa: F811
    result, _ = trained
    found = pipe_of(result)("anna in [MASK]", top_k=5)
    wanted = json.loads(invoke("predict", result.adapter_dir, "-t", "anna in [MASK]"))["fills"][0]
    assert [fill["token_str"] for fill in found] == [fill["token"] for fill in wanted]
    assert [fill["score"] for fill in found] == pytest.approx([fill["score"] for fill in wanted], rel=1e-4)


@pytest.mark.parametrize("trained", ["causal-lm", "seq2seq"], indirect=True)
def test_generation_gives_what_transformers_gives(trained: Any) -> None:  # noqa: F811
    """Scores, logits, hidden states and attentions of each step, those of the merged model."""
    result, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(result.adapter_dir)
    inputs = tokenizer("colour one", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
    kind = transformers.AutoModelForCausalLM if result.task == "causal-lm" else transformers.AutoModelForSeq2SeqLM
    asked = {"attn_implementation": "eager"}
    for more in ({}, {"num_beams": 2}):
        given = {**inputs, **wanted, **more, "max_new_tokens": 3, "return_dict_in_generate": True, "do_sample": False}
        mine = CLASSES[result.task].from_pretrained(result.adapter_dir, **asked).eval().generate(**given)
        merged = kind.from_pretrained(result.merged_dir, **asked).eval().generate(**given)
        assert type(mine) is type(merged)
        assert mine.keys() == merged.keys()
        assert torch.equal(mine.sequences, merged.sequences)
        compared = 0
        for name in mine.keys() - {"sequences", "past_key_values"}:
            torch.testing.assert_close(mine[name], merged[name], rtol=1e-3, atol=1e-4, msg=name)
            compared += 1
        assert compared >= 4


@pytest.mark.slow
def test_a_bundled_base_is_found_by_its_name(tmp_path: Any) -> None:
    """The adapter's config says `minilm-l6`, which is no name on the hub."""
    from veneer.train.bases import resolve_base

    base = veneer.AutoPeftModelForFeatureExtraction
    config = veneer.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["query"])
    from transformers import AutoModel

    model = veneer.get_peft_model(AutoModel.from_pretrained(resolve_base("minilm-l6").path), config)
    model.peft_config["default"].base_model_name_or_path = "minilm-l6"
    model.save_pretrained(tmp_path)
    again = base.from_pretrained(tmp_path)
    assert again.peft_config["default"].base_model_name_or_path == "minilm-l6"
    assert again.get_base_model().config._name_or_path == "minilm-l6"
