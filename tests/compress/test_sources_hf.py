"""Hugging Face folders: tasks from the config, safetensors only, nothing silently at random, rebuilt without weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibrate.errors import UserError
from calibrate.fidelity import sqnr_db
from compress.sources import load_model, rebuild_model, settle_torchvision

settle_torchvision()
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = SMALL | {"vocab_size": 40, "max_position_embeddings": 24}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 24}
IMAGE = SMALL | {"image_size": 16, "patch_size": 4}

CASES: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "bert": ("BertForSequenceClassification", TEXT | {"num_labels": 3}, "text-classification", (4, 3)),
    "regression": ("BertForSequenceClassification", TEXT | {"num_labels": 1}, "text-classification", (4, 1)),
    "roberta": ("RobertaForSequenceClassification", TEXT, "text-classification", (4, 2)),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40, "max_position_embeddings": 24},
        "text-classification",
        (4, 2),
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2, "causal-lm", (4, 16, 40)),
    "gpt2-classes": ("GPT2ForSequenceClassification", GPT2 | {"pad_token_id": 0}, "text-classification", (4, 2)),
    "llama": ("LlamaForCausalLM", TEXT | {"num_key_value_heads": 1}, "causal-lm", (4, 16, 40)),
    "masked": ("BertForMaskedLM", TEXT, "features", (4, 16, 40)),
    "base": ("BertModel", TEXT, "features", (4, 16, 16)),
    "vit": ("ViTForImageClassification", IMAGE | {"num_labels": 5}, "image-classification", (4, 5)),
    "deit": ("DeiTForImageClassificationWithTeacher", IMAGE, "image-classification", (4, 2)),
    "vit-base": ("ViTModel", IMAGE, "features", (4, 17, 16)),
}


def save(folder: Path, class_name: str, settings: dict[str, Any]) -> Path:
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(parameter.shape[-1], 1) ** 0.5)
    model.save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *["the", "a", "film", "is", "was", "good", "bad", "it", "rains", "not", ".", "dog", "cat"],
    ]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | special
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=20, **{key: value for key, value in names.items() if value}
    ).save_pretrained(folder)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in memory of their own: those of ``load_file`` are mapped to the file, which tests write over."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder = save(tmp_path / "bert", *CASES["bert"][:2])
    add_tokenizer(folder)
    return folder


@pytest.mark.parametrize("case", list(CASES))
def test_the_task_comes_from_the_config_and_the_model_is_rebuilt(tmp_path: Path, case: str) -> None:
    class_name, settings, task, shape = CASES[case]
    folder = save(tmp_path / case, class_name, settings)
    source = load_model(f"hf:{case}", base=tmp_path)
    assert (source.task, source.name) == (task, case)
    batch = source.example()
    assert tuple(batch) == source.signature.names
    outputs = source.signature.call(source.model, batch)
    assert outputs.shape == shape
    if "attention_mask" in batch:
        assert batch["attention_mask"].sum(1).unique().numel() > 1
    expected = getattr(transformers, class_name).from_pretrained(folder).eval()
    if task != "features":
        assert sqnr_db(expected(**batch).logits, outputs) > 100
    source.save_files(tmp_path / "run" / "source")
    model = rebuild_model(source.rebuild, tmp_path / "run")
    model.load_state_dict(source.model.state_dict())
    assert sqnr_db(outputs, source.signature.call(model, batch)) == float("inf")


def test_labels_classes_and_regression_heads(tmp_path: Path) -> None:
    save(tmp_path / "vit", "ViTForImageClassification", IMAGE | {"id2label": {0: "cat", 1: "dog", 2: "owl"}})
    source = load_model("hf:vit", base=tmp_path)
    assert source.labels == {0: "cat", 1: "dog", 2: "owl"}
    assert source.classes == 3
    save(tmp_path / "score", *CASES["regression"][:2])
    assert load_model("hf:score", base=tmp_path).classes == 1


def test_half_precision_is_read_as_float32(bert: Path) -> None:
    tensors = read(bert)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, bert / "model.safetensors", {"format": "pt"})
    config = json.loads((bert / "config.json").read_text()) | {"dtype": "float16"}
    (bert / "config.json").write_text(json.dumps(config))
    source = load_model("hf:bert", base=bert.parent)
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.float32}
    stored = source.model.state_dict()["classifier.weight"]
    assert torch.equal(stored, tensors["classifier.weight"].half().float())


def test_weights_in_several_files_are_read(bert: Path) -> None:
    tensors = read(bert)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    whole = load_model("hf:bert", base=bert.parent)
    (bert / "model.safetensors").unlink()
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, bert / file, {"format": "pt"})
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}, "metadata": {}}
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    source = load_model("hf:bert", base=bert.parent)
    batch = source.example()
    assert torch.equal(whole.signature.call(whole.model, batch), source.signature.call(source.model, batch))
    (bert / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors is missing"):
        load_model("hf:bert", base=bert.parent)


def test_the_fingerprint_changes_with_a_weight(bert: Path) -> None:
    before = load_model("hf:bert", base=bert.parent).fingerprint
    assert load_model(f"hf:{bert}", base=Path("/")).fingerprint == before
    tensors = read(bert)
    tensors["classifier.bias"][0] += 1
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    assert load_model("hf:bert", base=bert.parent).fingerprint != before


def test_the_tokenizer_pads_cuts_and_counts(bert: Path) -> None:
    source = load_model("hf:bert", base=bert.parent)
    assert source.tokenizer is not None
    batch, cut = source.tokenizer(["the film is good", "bad"], tokens=5)
    assert batch["input_ids"].tolist() == [[2, 4, 6, 7, 3], [2, 10, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert cut == [True, False]
    pair, _ = source.tokenizer(["good"], ["bad"], tokens=6)
    assert pair["input_ids"].tolist() == [[2, 9, 3, 10, 3, 0]]
    assert source.tokenizer.ids("the film") == [4, 6]
    assert source.max_tokens == 20


def test_a_tokenizer_without_padding_gets_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "gpt2", "GPT2ForSequenceClassification", GPT2)
    add_tokenizer(folder, pad_token="", eos_token="[SEP]")
    source = load_model("hf:gpt2", base=tmp_path)
    assert source.rebuild["pad_token_id"] == 3
    assert source.signature.call(source.model, source.example()).shape == (4, 2)
    source.save_files(tmp_path / "run" / "source")
    rebuilt = rebuild_model(source.rebuild, tmp_path / "run")
    assert rebuilt.config.pad_token_id == 3


def test_positions_that_start_after_the_padding_shorten_the_text(tmp_path: Path) -> None:
    save(tmp_path / "roberta", "RobertaForSequenceClassification", TEXT)
    assert load_model("hf:roberta", base=tmp_path).max_tokens == 24 - 2


def test_sentence_encoders_pool_by_the_mean(tmp_path: Path) -> None:
    folder = save(tmp_path / "encoder", "BertModel", TEXT)
    add_tokenizer(folder)
    kinds = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "type": kind} for kind in kinds]))
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    source = load_model("hf:encoder", base=tmp_path)
    assert (source.task, source.signature.output) == ("sentence-embedding", "mean_pooling")
    outputs = source.signature.call(source.model, source.example())
    assert torch.allclose(outputs.norm(dim=-1), torch.ones(4), atol=1e-6)
    assert not any("pooler" in name for name, _ in source.model.named_parameters())
    source.save_files(tmp_path / "run" / "source")
    rebuilt = rebuild_model(source.rebuild, tmp_path / "run")
    rebuilt.load_state_dict(source.model.state_dict())
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    with pytest.raises(UserError, match="pools by cls_token"):
        load_model("hf:encoder", base=tmp_path)
    shutil.rmtree(folder / "1_Pooling")
    (folder / "modules.json").write_text(json.dumps([{"type": kind} for kind in [*kinds, "x.models.Dense"]]))
    with pytest.raises(UserError, match="has the layer Dense"):
        load_model("hf:encoder", base=tmp_path)


def test_the_task_may_be_said(bert: Path) -> None:
    source = load_model("hf:bert", base=bert.parent, task="sentence-embedding")
    assert source.signature.call(source.model, source.example()).shape == (4, 16)
    assert load_model("hf:bert", base=bert.parent, task="features").signature.output == "last_hidden_state"
    with pytest.raises(UserError, match="does text-classification, not causal-lm"):
        load_model("hf:bert", base=bert.parent, task="causal-lm")


def test_preprocessing_comes_from_the_folder_or_from_the_class(tmp_path: Path) -> None:
    folder = save(tmp_path / "vit", *CASES["vit"][:2])
    source = load_model("hf:vit", base=tmp_path)
    assert source.preprocessing is not None
    assert source.preprocessing["size"] == source.preprocessing["resize"] == [16, 16]
    assert source.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert "ViTImageProcessor" in source.preprocessing["from"]
    with pytest.MonkeyPatch.context() as without:
        without.setitem(sys.modules, "PIL", None)
        with pytest.raises(UserError, match="PIL is not installed"):
            load_model("hf:vit", base=tmp_path)
    said = {"size": {"shortest_edge": 20}, "crop_size": 16, "do_center_crop": True, "image_mean": [0.1, 0.2, 0.3], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    found = load_model("hf:vit", base=tmp_path).preprocessing
    assert found is not None
    assert (found["resize"], found["crop"], found["interpolation"]) == (20, True, "bicubic")
    assert found["mean"] == [0.1, 0.2, 0.3]
    assert found["from"] == "preprocessor_config.json"


def edited(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_folders_that_are_not_models_are_refused(bert: Path, tmp_path: Path) -> None:
    def refuses(says: str, name: str = "bert") -> None:
        with pytest.raises(UserError, match=says) as caught:
            load_model(f"hf:{name}", base=tmp_path)
        assert "\n" not in caught.value.what

    refuses("there is no such folder\n  Nearest: bert", "./brt")
    refuses("no such folder here, and the hub did not give it", "someone/bert")
    refuses(r"a \.\.\. \(5000 characters\): no such folder here", "a" * 5000)
    refuses(r"\(5000 characters\): there is no such folder\n  Name the folder", "a/" * 2500)
    refuses("there is no such folder\n  Name the folder", "no/such/folder")
    original = (bert / "config.json").read_text()
    edited(bert, model_type="brt")
    refuses("unknown model_type 'brt'\n  Nearest: bert")
    edited(bert, model_type="mine", auto_map={"AutoModel": "modeling.Mine"})
    refuses("asks for code of its own, which is never run\n  Load it in a function")
    for text in ("{", "", "\xff", "[" * 100_000):
        (bert / "config.json").write_text(text, encoding="latin-1")
        refuses("config.json: is not JSON .*\n  Copy or download")
    for text in ("[1]", "null", "3"):
        (bert / "config.json").write_text(text)
        refuses("config.json: is not a JSON object\n  Copy or download")
    (bert / "config.json").write_text(original)
    edited(bert, architectures=["BertForTokenClassification"])
    refuses("the task of BertForTokenClassification is not supported\n  Give task: features")
    edited(bert, architectures=["BertForNothingAtAll"])
    refuses("task of BertForNothingAtAll")
    edited(bert, architectures=["BertForSequenceClassification"], num_labels=7, id2label={str(n): str(n) for n in range(7)})
    refuses(r"the weight classifier.bias is \[3\], by config.json it is \[7\]\n  The weights and config.json do not belong")
    (bert / "config.json").unlink()
    refuses("holds no config.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": "x"}, "is not a valid configuration: .*'hidden_size': .*expected int"),
        ({"architectures": [1]}, "architectures is not a list of names"),
        ({"architectures": "Bert"}, "architectures is not a list of names"),
        ({"model_type": ["bert"]}, "unknown model_type"),
        ({"id2label": {"a": "b"}}, "is not a valid configuration"),
        ({"num_attention_heads": 0}, "cannot be loaded: ZeroDivisionError"),
        ({"num_attention_heads": 3}, "cannot be loaded: The hidden size .16. is not a multiple"),
        ({"hidden_act": "nope"}, "cannot be loaded: KeyError: 'nope'"),
        ({"hidden_size": 32}, r"the weight bert.embeddings.LayerNorm.bias is \[16\], by config.json it is \[32\]"),
        ({"vocab_size": 2**33}, r"word_embeddings.weight is \[40, 16\], by config.json it is \[8589934592, 16\]"),
        ({"num_hidden_layers": 3}, r"the weights lack bert.encoder.layer.2.* \(and 15 more\)"),
        ({"num_hidden_layers": 1}, r"the weights hold bert.encoder.layer.1.* \(and 15 more\), a layer that config.json does not"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(bert: Path, changes: dict[str, Any], says: str) -> None:
    edited(bert, **changes)
    with pytest.raises(UserError, match=says) as caught:
        load_model("hf:bert", base=bert.parent)
    assert caught.value.hint
    assert "\n" not in caught.value.what


def test_weights_beyond_the_model_are_told(bert: Path) -> None:
    assert load_model("hf:bert", base=bert.parent).notes == ()
    (note,) = load_model("hf:bert", base=bert.parent, task="features").notes
    assert re.match(
        r"4 weights of the file are not part of BertModel: (bert\.pooler\.dense|classifier)\.bias \(and 3 more\)", note
    )


def test_code_beside_a_known_model_is_not_run(bert: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (bert / "evil.py").write_text(code)
    edited(bert, auto_map={"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"})
    settings = json.loads((bert / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "Evil"}
    (bert / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_model("hf:bert", base=tmp_path).task == "text-classification"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "names no files of weights"),
        ('{"weight_map": {}}', "names no files of weights"),
        ('{"weight_map": {"a": ["x"]}}', "names no files of weights"),
        ('{"weight_map": {"a": "../../x.safetensors"}}', "names ../../x.safetensors, which is not in the folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', "x.safetensors is missing"),
    ],
)
def test_an_index_of_weights_that_is_wrong_is_refused(bert: Path, index: str, says: str) -> None:
    (bert / "model.safetensors").unlink()
    (bert / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=says):
        load_model("hf:bert", base=bert.parent)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("modules.json", "{", "modules.json: is not JSON"),
        ("modules.json", "[1]", "has the layer 1 after the transformer"),
        ("1_Pooling/config.json", "[]", "config.json: is not a JSON object"),
    ],
)
def test_files_of_a_sentence_encoder_that_are_wrong_are_refused(bert: Path, file: str, text: str, says: str) -> None:
    (bert / "1_Pooling").mkdir()
    (bert / file).write_text(text)
    with pytest.raises(UserError, match=says):
        load_model("hf:bert", base=bert.parent, task="sentence-embedding")


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"image_std": [0.5, 0, 0.5]}', "has a value that is not understood .image_std"),
        ('{"image_mean": "x"}', "has a value that is not understood"),
        ('{"size": {"height": "x"}}', "has a value that is not understood"),
    ],
)
def test_preprocessing_that_is_wrong_is_refused(tmp_path: Path, said: str, says: str) -> None:
    folder = save(tmp_path / "vit", *CASES["vit"][:2])
    (folder / "preprocessor_config.json").write_text(said)
    with pytest.raises(UserError, match=says):
        load_model("hf:vit", base=tmp_path)


@pytest.mark.parametrize("length", [2**62, 100_000_000, 100_000_001, 5])
def test_a_header_of_absurd_size_is_refused_before_it_is_read(bert: Path, length: int) -> None:
    """In a process whose memory is bounded: what is there and 64 MB, less than the header says it takes."""
    (bert / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + 64_000_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"model.safetensors: is damaged or not a safetensors file .*header.*\n  Copy"):
            load_model("hf:bert", base=bert.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_weights_that_are_not_there_are_refused(bert: Path, tmp_path: Path) -> None:
    whole = (bert / "model.safetensors").read_bytes()
    tensors = read(bert)

    def refuses(says: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match=says):
                load_model("hf:bert", base=tmp_path)

    (bert / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refuses("is damaged or not a safetensors file")
    (bert / "model.safetensors").write_bytes(b"")
    refuses("is damaged or not a safetensors file")
    save_file(
        {key: value for key, value in tensors.items() if "classifier" not in key}, bert / "model.safetensors", {"format": "pt"}
    )
    refuses(r"the weights lack classifier.bias \(and 1 more\)")
    tensors["classifier.bias"][0] = float("inf")
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    refuses("the weight classifier.bias holds NaN or infinity")
    (bert / "model.safetensors").unlink()
    refuses("holds no model.safetensors")
    (bert / "pytorch_model.bin").write_bytes(b"pickle")
    refuses("its weights are a pickle .pytorch_model.bin., which is not read\n  Convert")


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=40)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="t5 is an encoder-decoder"):
        load_model("hf:t5", base=tmp_path)


def test_a_damaged_tokenizer_is_refused(bert: Path, tmp_path: Path) -> None:
    (bert / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_model("hf:bert", base=tmp_path)
