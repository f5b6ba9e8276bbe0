"""Embeddings and classes over HTTP equal the model's own, with texts for several adapters in one call."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serve_zoo import Running
from ship_zoo import randomised, save_adapter, save_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from veneer import LoraConfig, get_peft_model
from veneer.errors import AdapterError
from veneer.serving.api import Limits
from veneer.serving.engine import Engine
from veneer.serving.load import Served, load_pool

TEXTS = ["send two apples", "please send me three blue plums to the shop of Ada", "Bob"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifiers(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, out = tmp_path_factory.mktemp("classifiers"), {}
    config = {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 12, "task_type": "SEQ_CLS"}
    for seed, (name, labels) in enumerate({"mood": 3, "topic": 3, "five": 5}.items()):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=labels)
        adapter = LoraConfig(**config, modules_to_save=["pooler", "classifier"])  # the base's pooler is new, too
        randomised(get_peft_model(model, adapter), seed).save_pretrained(str(root / name))
        out[name] = root / name
    (root / "mood" / "labels.json").write_text('["bad", "fair", "good"]')
    return out


def start(served: Served, **limits: Any) -> Running:
    engine = Engine(served.pool, served.tokenizer, max_batch=4, pooling=served.pooling).start()
    return Running(
        engine, Limits(seconds=60, **limits), task=served.task, base_answers=served.base_answers,
        labels=tuple(served.labels),
    )  # fmt: skip


@pytest.fixture(scope="module")
def classifying(bert: Path, classifiers: dict[str, Path]) -> Iterator[Running]:
    served = load_pool(str(bert), {n: str(classifiers[n]) for n in ("mood", "topic")}, task="seq-cls")
    made = start(served)
    yield made
    made.stop()


def own_probs(bert: Path, folder: Path, text: str, tokenizer: Any, labels: int = 3) -> torch.Tensor:
    from veneer import PeftModel

    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=labels)
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(0)


def test_classes_of_two_adapters(classifying: Running, bert: Path, classifiers: dict[str, Path]) -> None:
    tokenizer = classifying.engine.tokenizer
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda n: classifying.post("/classify", {"model": n, "input": TEXTS}), ("mood", "topic")))
    for name, (status, body) in zip(("mood", "topic"), both, strict=True):
        assert status == 200, body
        for text, row in zip(TEXTS, body["data"], strict=True):
            want = own_probs(bert, classifiers[name], text, tokenizer)
            assert torch.allclose(torch.tensor(row["probs"]), want, atol=1e-5)
            assert row["num_classes"] == 3
            assert row["label"] == ["bad", "fair", "good"][int(want.argmax())]  # the first to name them names them all
        assert body["usage"]["prompt_tokens"] == sum(len(tokenizer(t)["input_ids"]) for t in TEXTS)
    one = classifying.post("/v1/classify", {"model": "mood", "input": "Bob"})[1]["data"][0]
    assert one["probs"] == pytest.approx(both[0][1]["data"][2]["probs"], abs=1e-5)


def test_a_base_without_a_head_does_not_classify(classifying: Running) -> None:
    assert [m.id for m in classifying.client().models.list()] == ["mood", "topic"]
    assert classifying.post("/classify", {"model": "base", "input": "Bob"})[0] == 404


def test_classifiers_of_different_sizes_are_refused(bert: Path, classifiers: dict[str, Path]) -> None:
    with pytest.raises(AdapterError, match="different numbers of classes"):
        load_pool(str(bert), {n: str(p) for n, p in classifiers.items()}, task="seq-cls")


def test_embeddings_of_an_encoder(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    served = load_pool(str(bert), {})
    assert served.task == "embedding"  # the base has no head
    running = start(served, texts=5)
    client = running.client()
    found = client.embeddings.create(model="base", input=TEXTS)  # the client asks for base64
    plain = client.embeddings.create(model="base", input=TEXTS, encoding_format="float")
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for text, row, same in zip(TEXTS, found.data, plain.data, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        want = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        assert torch.allclose(torch.tensor(row.embedding), want, atol=1e-5)
        assert torch.allclose(torch.tensor(same.embedding), want, atol=1e-5)
    short = client.embeddings.create(model="base", input=TEXTS[0], dimensions=4).data[0].embedding
    assert sum(v * v for v in short) == pytest.approx(1, abs=1e-5)
    ids = tokenizer(TEXTS[0])["input_ids"]
    by_ids = client.embeddings.create(model="base", input=ids, encoding_format="float").data[0].embedding
    assert by_ids == pytest.approx(plain.data[0].embedding, abs=1e-5)
    bad: list[dict[str, Any]] = [
        {"input": []}, {"input": ""}, {"input": ["a"] * 6}, {"input": "apples " * 70}, {"input": [9999]},
        {"input": "Bob", "dimensions": 33}, {"input": "Bob", "encoding_format": "int8"},
    ]  # fmt: skip
    for more in bad:
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(**{"model": "base", **more})
    with pytest.raises(openai.BadRequestError, match="this endpoint needs causal-lm"):
        client.completions.create(model="base", prompt="Bob")
    running.stop()


def test_embeddings_beside_answers_of_a_language_model(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from veneer import PeftModel

    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=32, task_type="CAUSAL_LM")
    folder = save_adapter(llama, config, tmp_path / "red")
    running = start(load_pool(str(llama), {"red": str(folder)}))
    client = running.client()

    def write(n: int) -> str:
        done = client.completions.create(model="red", prompt=TEXTS[0], max_tokens=n, temperature=0)
        return done.choices[0].text

    def embed(name: str) -> list[list[float]]:
        return [row.embedding for row in client.embeddings.create(model=name, input=TEXTS).data]

    quiet = write(25)
    with ThreadPoolExecutor(6) as pool:
        texts = [pool.submit(write, 25) for _ in range(3)]
        vectors = [pool.submit(embed, name) for name in ("base", "red") * 2]
        assert all(t.result() == quiet for t in texts)
        found = [v.result() for v in vectors]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folder)).eval()
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([running.engine.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0]
        want = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        for vectors_of_red in (found[1], found[3]):
            assert torch.allclose(torch.tensor(vectors_of_red[i]), want, atol=1e-4)
        assert not torch.allclose(torch.tensor(found[0][i]), want, atol=1e-2)
    running.stop()


def test_a_failing_call_answers_its_readers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start(load_pool(str(llama), {}))
    monkeypatch.setattr(running.engine, "_call", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        running.client().embeddings.create(model="base", input="Bob")
    running.stop()
