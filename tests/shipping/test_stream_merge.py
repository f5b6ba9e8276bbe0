"""Streaming merges equal merge_and_unload, bit for bit, over the registry; resumed, tied, cast, certified."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from ship_zoo import probe, save_adapter, save_llama
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from typer.testing import CliRunner

from veneer import LoraConfig, PeftModel, PromptTuningConfig, registry
from veneer.cli.app import app
from veneer.docs.facts import needs_others, settings
from veneer.errors import AdapterError, CannotMerge
from veneer.export import merging, streaming
from veneer.export.merging import merge_to_folder
from veneer.export.shard_file import is_complete, write_shard

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
MERGEABLE = [n for n, e in registry.METHODS.items() if getattr(registry.method(n), "mergeable", False)]


def config_of(name: str) -> Any:
    method = registry.method(name)
    made = method.Config(task_type="CAUSAL_LM", **settings(method))
    return made if registry.method_of(made) is method else None


def in_memory(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    return model.merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files."""
    return save_llama(tmp_path_factory.mktemp("models") / "sharded", max_shard_size="20KB")


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = load_file(path)
        assert not out.keys() & held.keys()
        out |= held
    return out


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that the methods' default sizes fit."""
    return save_llama(tmp_path_factory.mktemp("models") / "roomy", width=64, max_shard_size="100KB")


QUICK = ("LORA", "DORA", "LOHA", "IA3", "OFT", "VERA", "LN_TUNING", "TRAINABLE_TOKENS", "OSF")
GROWS = ("BEFT",)  # trains a bias, which this model's layers do not have


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MERGEABLE])
def test_every_mergeable_method(name: str, roomy: Path, tmp_path: Path) -> None:
    sharded = roomy
    config = config_of(name)
    if config is None or needs_others(registry.method(name)):
        assert name not in registry.types(), f"{name} has no example of its own"
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = save_adapter(sharded, config, tmp_path / "a")
        if name in GROWS:
            with pytest.raises(CannotMerge, match="has no bias"):
                merge_to_folder(str(folder), tmp_path / "m")
            assert [p.name for p in tmp_path.iterdir()] == ["a"]
            return
        done = merge_to_folder(str(folder), tmp_path / "m", tolerance={"float32": 1e-2})
        want = in_memory(sharded, folder)
    assert done.streamed, done.why
    got = read_folder(tmp_path / "m")
    assert got.keys() == want.keys()
    for key, t in want.items():
        assert torch.equal(got[key], t), key
    before = read_folder(sharded)
    assert any(not torch.equal(before[k], got[k]) for k in got)


def test_shards_are_those_of_the_base(sharded: Path, tmp_path: Path) -> None:
    folder = save_adapter(sharded, LoraConfig(**LORA), tmp_path / "a")
    merge_to_folder(str(folder), tmp_path / "m")
    name = "model.safetensors.index.json"
    base, made = (json.loads((f / name).read_text()) for f in (sharded, tmp_path / "m"))
    assert len(set(base["weight_map"].values())) > 3
    assert made["weight_map"] == base["weight_map"]
    assert made["metadata"]["total_size"] == base["metadata"]["total_size"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sharded), str(folder)).eval()
    with torch.no_grad():
        assert torch.allclose(model(probe()).logits, adapted(probe()).logits, atol=1e-4)
    held = json.loads((tmp_path / "m" / "merge_certificate.json").read_text())
    assert held["share"] < 1e-4
    assert held["top1_agreement"] == 1.0
    assert held["kl_max"] < 1e-6
    assert "KL divergence" in (tmp_path / "m" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m"]


TIED = {
    "embedding alone": (["embed_tokens"], None, False),
    "head alone": (["lm_head"], None, False),
    "elsewhere": (["q_proj"], None, True),
    "head whole": (["q_proj"], ["lm_head"], False),
    "embedding whole": (["q_proj"], ["embed_tokens"], False),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_weights(case: str, tmp_path: Path) -> None:
    targets, saved, stays = TIED[case]
    base = save_llama(tmp_path / "tied", tied=True)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    config = LoraConfig(**{**LORA, "target_modules": targets, "modules_to_save": saved})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = save_adapter(base, config, tmp_path / "a")
        merge_to_folder(str(folder), tmp_path / "m")
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.config.tie_word_embeddings is stays
    assert ("lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) is not stays
    with torch.no_grad():
        assert torch.allclose(model(probe()).logits, adapted(probe()).logits, atol=1e-4)


def test_bias_and_token_rows(sharded: Path, tmp_path: Path) -> None:
    folder = save_adapter(sharded, LoraConfig(**LORA, trainable_token_indices=[3, 9]), tmp_path / "a")
    merge_to_folder(str(folder), tmp_path / "m")
    want, got = in_memory(sharded, folder), read_folder(tmp_path / "m")
    for key, t in want.items():
        assert torch.equal(got[key], t), key
    before = read_folder(sharded)["model.embed_tokens.weight"]
    changed = (got["model.embed_tokens.weight"] != before).any(1).nonzero().flatten().tolist()
    assert changed == [3, 9]


def test_a_grown_vocabulary(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from veneer import get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    base = AutoModelForCausalLM.from_pretrained(llama)
    torch.manual_seed(0)
    base.resize_token_embeddings(len(tokenizer))
    folder = tmp_path / "a"
    get_peft_model(base, LoraConfig(**LORA)).save_pretrained(str(folder), save_embedding_layers=True)
    tokenizer.save_pretrained(folder)
    merge_to_folder(str(folder), tmp_path / "m")
    got = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(got["model.embed_tokens.weight"], base.get_input_embeddings().weight)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.config.vocab_size == len(tokenizer)


def test_a_classifier_that_the_base_lacks(tmp_path: Path) -> None:
    from ship_zoo import save_tokenizer
    from transformers import AutoModelForSequenceClassification

    from veneer import get_peft_model

    base = tmp_path / "bert"
    size = save_tokenizer(base)
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(base)
    config = LoraConfig(target_modules=["query"], r=3, task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=5), config).eval()
    model.save_pretrained(str(tmp_path / "a"))
    done = merge_to_folder(str(tmp_path / "a"), tmp_path / "m")
    assert done.streamed, done.why
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.allclose(merged(probe()).logits, model(probe()).logits, atol=1e-5)


# -- cut off -------------------------------------------------------------------------------------------------------
def test_a_cut_off_merge_goes_on(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_adapter(sharded, LoraConfig(**LORA), tmp_path / "a")
    seen: list[str] = []
    write = streaming.write_shard

    def cut(path: Path, plan: Any, tensors: Any) -> None:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(path.name)
        write(path, plan, tensors)

    monkeypatch.setattr(streaming, "write_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        merge_to_folder(str(folder), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(streaming, "write_shard", write)
    told: list[tuple[str, bool]] = []
    merge_to_folder(str(folder), tmp_path / "m", on_shard=lambda s, kept: told.append((s, kept)))
    assert [s for s, kept in told if kept] == seen
    assert len(told) > 3
    want = in_memory(sharded, folder)
    got = read_folder(tmp_path / "m")
    assert all(torch.equal(got[k], t) for k, t in want.items())
    assert not list((tmp_path / "m").glob("merge_progress*"))


def test_another_adapter_does_not_go_on(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (save_adapter(sharded, LoraConfig(**LORA), tmp_path / n, s) for n, s in (("a", 1), ("b", 2)))
    monkeypatch.setattr(streaming, "_config", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge_to_folder(str(first), tmp_path / "m")
    monkeypatch.undo()
    told: list[bool] = []
    merge_to_folder(str(second), tmp_path / "m", on_shard=lambda _, kept: told.append(kept))
    assert not any(told)
    want, got = in_memory(sharded, second), read_folder(tmp_path / "m")
    assert all(torch.equal(got[k], t) for k, t in want.items())


def test_the_writer_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(), "b": torch.randn(2).double(), "c": torch.tensor(4), "d": torch.zeros(0, 3),
        "e": torch.randn(4, 6).T, "f": torch.tensor([True, False]),
    }  # fmt: skip
    plan = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
    path = tmp_path / "x.safetensors"
    write_shard(path, plan, reversed(list(tensors.items())))
    held = load_file(path)
    assert all(torch.equal(held[k], t) for k, t in tensors.items())
    assert is_complete(path, plan)
    assert not is_complete(path, {**plan, "c": (torch.int32, ())})
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    assert not is_complete(path, plan)
    with pytest.raises(ValueError, match="planned and not given"):
        write_shard(tmp_path / "y.safetensors", plan, [("a", tensors["a"])])
    with pytest.raises(ValueError, match="a: planned"):
        write_shard(tmp_path / "y.safetensors", plan, [("a", tensors["b"])])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]


# -- refused -------------------------------------------------------------------------------------------------------
def test_refusals_leave_nothing(sharded: Path, tmp_path: Path) -> None:
    prompt = save_adapter(sharded, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), tmp_path / "p")
    with pytest.raises(AdapterError, match="no weights to merge"):
        merge_to_folder(str(prompt), tmp_path / "m")
    alora = LoraConfig(**LORA, alora_invocation_tokens=[5])
    with pytest.raises(CannotMerge, match="depends on the input"):
        merge_to_folder(str(save_adapter(sharded, alora, tmp_path / "al")), tmp_path / "m")
    broken = save_adapter(sharded, LoraConfig(**LORA), tmp_path / "b")
    path = broken / "adapter_model.safetensors"
    tensors = load_file(path)
    next(t for k, t in tensors.items() if "lora_B" in k).fill_(float("nan"))
    save_file(tensors, path)
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_to_folder(str(broken), tmp_path / "m", safe=True)
    with pytest.raises(merging.Different, match="differ from base"):
        merge_to_folder(str(broken), tmp_path / "m")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("m")]


def test_rounding_is_judged_by_the_adapters_effect(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(sharded, LoraConfig(**LORA), tmp_path / "a")
    done = merge_to_folder(str(folder), tmp_path / "m", tolerance={"float32": 0.0}, dtype="bfloat16")
    assert 0 < done.certificate.of_effect < merging.ROUNDING
    held = json.loads((tmp_path / "m" / "merge_certificate.json").read_text())
    assert held["of_effect"] == done.certificate.of_effect
    assert math.isnan(merge_to_folder(str(folder), tmp_path / "n", tolerance={"float32": 1.0}).certificate.of_effect)

    def forget(mapped: Any, model: Any, *rest: Any, **more: Any) -> None:
        held = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
        for name in held:
            model.get_parameter(name).data.zero_()
        stream(mapped, model, *rest, **more)
        for name, value in held.items():
            model.get_parameter(name).data.copy_(value)

    stream = merging.stream_merge
    monkeypatch.setattr(merging, "stream_merge", forget)
    with pytest.raises(merging.Different, match="100 % of what the adapter changes"):
        merge_to_folder(str(folder), tmp_path / "o")


def test_other_files_are_loaded_whole(llama: Path, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "bin"
    shutil.copytree(llama, base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    folder = save_adapter(llama, LoraConfig(**LORA), tmp_path / "a")
    done = merge_to_folder(str(folder), tmp_path / "m", base=str(base))
    assert not done.streamed
    assert "model.safetensors" in done.why
    want, got = in_memory(llama, folder), read_folder(tmp_path / "m")
    assert all(torch.equal(got[k], t) for k, t in want.items())


def test_the_command(sharded: Path, tmp_path: Path) -> None:
    folder = save_adapter(sharded, LoraConfig(**LORA), tmp_path / "a")
    (tmp_path / "text").write_text("send two apples\n\nto Ada\n")
    more = ["--dtype", "bfloat16", "--sample", tmp_path / "text", "--progress"]
    words = ["merge", folder, "--out", tmp_path / "m", *more]
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    assert "KL divergence" in done.output
    assert "model-00001" in done.output
    assert {t.dtype for t in read_folder(tmp_path / "m").values()} == {torch.bfloat16}
    want = in_memory(sharded, folder)
    assert all(torch.equal(t, want[k].bfloat16()) for k, t in read_folder(tmp_path / "m").items())


MEMORY = """
import sys, threading, time
from pathlib import Path
from veneer.export import merging

def held():
    with open("/proc/self/status") as f:
        return next(int(l.split()[1]) for l in f if l.startswith("RssAnon")) // 1024

def watch():
    while True:
        seen.append(held())
        time.sleep(0.002)

merging.outputs = lambda *a: None  # the certificate runs the model; what is measured here is the writing
merging._check = lambda *a: type("C", (), {"write": lambda s, f: None, "lines": lambda s: [], "dtype": "float32"})()
seen = []
threading.Thread(target=watch, daemon=True).start()
merging.merge_to_folder(sys.argv[1], Path(sys.argv[2]))
print(max(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A 400 MB base: the most that the process itself holds is within 130 MB of that for one layer."""
    from ship_zoo import save_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for layers in (1, 24):
        base = tmp_path / f"base{layers}"
        base.mkdir()
        size = save_tokenizer(base)
        config = LlamaConfig(
            vocab_size=size, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(base, max_shard_size="100MB")
        folder = save_adapter(base, LoraConfig(**LORA), tmp_path / f"a{layers}")
        words = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / f"m{layers}")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(int(done.stdout.split()[-1]))
    assert found[1] - found[0] < 130, found
