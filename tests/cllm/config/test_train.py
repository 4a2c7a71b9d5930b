"""Settings: layers and their order, where each value came from, TOML there and back, and what a wrong value is told."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.config import schema
from cllm.config.schema import SETTINGS
from cllm.config.train import TrainConfig
from cllm.runtime import compiler
from cllm.runtime.errors import UserError


def resolved(**values):
    config = TrainConfig(**{"precision": "fp32", **values})
    return config.resolve(config.model_config(512), 100_000)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *(("data.document_mask", text, True) for text in ("true", "True", "TRUE", "yes", "Yes", "on", "1")),
        *(("data.document_mask", text, False) for text in ("false", "False", "no", "OFF", "0")),
        *(("train.steps", text, 1_000_000) for text in ("1000000", "1_000_000", "1e6", "1E+6", "1000000.0", " 1000000 ")),
        *(("train.steps", text, None) for text in ("none", "None", "null")),
        *(("optim.learning_rate", text, 0.001) for text in ("1e-3", "0.001", "1E-3", ".001", "0.00_1")),
        ("optim.learning_rate", "1", 1.0),
        ("optim.learning_rate", "none", None),
        ("data.exclude", "none", "none"),
        ("data.exclude", "2024", "2024"),
        ("data.exclude", "true", "true"),
        ("data.exclude", '"a, b"', "a, b"),
        ("data.exclude", "[a]", "[a]"),
        ("data.exclude", "it's", "it's"),
        ("model.rope_scaling", "null", None),
        ("model.gated", "yes", True),
    ],
)
def test_a_text_is_read_by_the_type_of_its_setting_as_flag_and_with_set(key, text, value):
    found = [TrainConfig.from_layers(sets=[f"{key}={text}"])[key]]
    if not text.startswith('"'):  # quotes are TOML's, which --set is written like
        found.append(TrainConfig.from_layers(flags={key: text})[key])
    assert all(each == value and type(each) is type(value) for each in found)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.steps", "2M", "steps must be a whole number, got '2M' (from {}). Use a value like 1000."),
        ("train.steps", "1.5", "steps must be a whole number, got '1.5' (from {}). Use a value like 1000."),
        ("train.steps", "1,000", "steps must be a whole number, got '1,000' (from {}). Use a value like 1000."),
        ("train.steps", "true", "steps must be a whole number, got 'true' (from {}). Use a value like 1000."),
        ("train.steps", "", "steps must be a whole number, got '' (from {}). Use a value like 1000."),
        ("train.steps", "inf", "steps must be a whole number, got 'inf' (from {}). Use a value like 1000."),
        ("train.steps", "1e400000000", "steps must be a whole number, got '1e400000000' (from {}). Use a value like 1000."),
        ("train.steps", "9" * 20, f"steps must be at most 9223372036854775807, got {'9' * 20} (from {{}}). Use a value like 1000."),
        ("train.keep", "none", "keep must be a whole number, got 'none' (from {}). Use a value like 2."),
        ("optim.learning_rate", "fast", "learning_rate must be a number, got 'fast' (from {}). Use a value like 3e-4."),
        ("optim.learning_rate", "nan", "learning_rate must be a finite number, got nan (from {}). Use a value like 3e-4."),
        ("data.document_mask", "2", "document_mask must be true or false, got '2' (from {})."),
    ],
)
def test_a_text_that_does_not_fit_says_what_was_expected(key, text, message):
    with pytest.raises(UserError) as caught:
        TrainConfig.from_layers(sets=[f"{key}={text}"])
    assert str(caught.value) == message.format(f"--set {key}")
    with pytest.raises(UserError) as caught:
        TrainConfig.from_layers(flags={key: text})
    assert str(caught.value) == message.format("--" + key.partition(".")[2].replace("_", "-"))


def test_an_empty_flag_is_refused_and_an_empty_set_empties():
    with pytest.raises(UserError, match=r"start_from is empty \(from --from\)\. Give a value, or leave the option out"):
        TrainConfig.from_layers(flags={"finetune.start_from": ""})
    assert TrainConfig.from_layers(sets=["data.exclude="])["data.exclude"] == ""


@pytest.mark.parametrize("key", ["data.path", "finetune.start_from", "data.tokenizer"])
def test_an_address_is_no_place_on_this_machine(key):
    for address in ("https://example.org/x", "s3://bucket/x", "HF://a/b"):
        with pytest.raises(UserError, match=f"must be a file or folder on this machine, got '{address}'"):
            TrainConfig.from_layers(flags={key: address})


def test_a_configuration_nested_too_deep_is_one_line(tmp_path):
    (tmp_path / "deep.toml").write_text("[data]\nexclude = " + "[" * 100_000)
    with pytest.raises(UserError, match="nested too deep"):
        TrainConfig.from_toml(tmp_path / "deep.toml")
    assert TrainConfig.from_layers(sets=["data.exclude=" + "[" * 100_000])["data.exclude"].startswith("[[")


def test_a_list_is_no_text_and_a_very_long_value_is_not_printed_whole():
    with pytest.raises(UserError, match=r"exclude must be text, got \['a', 'b'\]"):
        TrainConfig.from_layers(sets=['data.exclude=["a", "b"]'])
    with pytest.raises(UserError) as caught:
        TrainConfig.from_layers(sets=["train.steps=" + "x" * 10_000])
    assert len(str(caught.value)) < 200


@given(text=st.text(max_size=30), key=st.sampled_from(sorted(SETTINGS)))
def test_any_text_is_read_or_refused_in_one_line(text, key):
    try:
        value = TrainConfig.from_layers(flags={key: text})[key]
    except UserError as error:
        assert "\n" not in str(error) and key.partition(".")[2] in str(error)
    else:
        assert value is None or type(value) in SETTINGS[key].types


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lr", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("train.lr", "optim.learning_rate"),
        ("LR", "optim.learning_rate"),
        ("max-lr", "optim.learning_rate"),
        ("train.learning_rate", "optim.learning_rate"),
        ("learningRate", "optim.learning_rate"),
        ("optim.lerning_rate", "optim.learning_rate"),
        ("wd", "optim.weight_decay"),
        ("bs", "train.batch_size"),
        ("batchsize", "train.batch_size"),
        ("ctx", "train.seq_len"),
        ("block_size", "train.seq_len"),
        ("n_layer", "model.num_layers"),
        ("model.layers", "model.num_layers"),
        ("heads", "model.num_heads"),
        ("dim", "model.embed_dim"),
        ("epoch", "train.epochs"),
        ("train.step", "train.steps"),
        ("dropout", None),
        ("zzz", None),
    ],
)
def test_a_wrong_key_suggests_the_setting_that_is_meant(wrong, meant):
    with pytest.raises(UserError) as caught:
        TrainConfig.from_layers(sets=[f"{wrong}=1"])
    assert (f"Did you mean {meant!r}?" in str(caught.value)) if meant else ("Did you mean" not in str(caught.value))


def test_the_other_names_of_settings_lead_to_settings():
    assert set(schema._OTHER_NAMES) <= {key.partition(".")[2] for key in SETTINGS}
    assert not set(schema._MEANT) & {key.partition(".")[2] for key in SETTINGS}
    assert len(schema._MEANT) == sum(len(names.split()) for names in schema._OTHER_NAMES.values())


def test_later_layers_win_and_each_value_knows_its_source(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nsteps = 10\nbatch_size = 4\nseq_len = 32\n[optim]\nlearning_rate = 1\n")
    config = TrainConfig.from_layers(file=file, flags={"batch_size": 5, "seq_len": None, "data.path": "x"}, sets=["optim.beta2=0.99", "batch_size=6"])
    assert (config.train.steps, config.train.batch_size, config.train.seq_len, config.optim.beta2) == (10, 6, 32, 0.99)
    assert config.optim.learning_rate == 1.0 and isinstance(config.optim.learning_rate, float)
    assert config.sources["train.steps"] == f"file {file}"
    assert config.sources["train.batch_size"] == "--set batch_size"
    assert config.sources["train.grad_accum"] == "default"
    assert TrainConfig.from_layers(flags={"learning_rate": 0.5}).sources["optim.learning_rate"] == "--learning-rate"


def test_epochs_of_a_flag_replace_steps_of_a_file_but_both_together_are_refused(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nsteps = 10\n")
    config = TrainConfig.from_layers(file=file, flags={"epochs": 2.0})
    assert config.train.steps is None and config.train.epochs == 2.0
    with pytest.raises(UserError, match="steps and epochs exclude each other"):
        TrainConfig.from_layers(flags={"epochs": 2.0, "steps": 5})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1e-3}, r"learning_rate must be > 0.0, got -0.001 .*Use a value like 3e-4"),
        ({"learnin_rate": 1e-3}, r"unknown setting 'learnin_rate'.*'optim.learning_rate'"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"precision": "bf61"}, "precision must be one of auto, fp32, bf16, fp16, got 'bf61'.*Did you mean 'bf16'"),
        ({"min_lr": 1.0, "learning_rate": 0.1}, "min_lr must be <= learning_rate"),
        ({"warmup": 20, "steps": 10}, "warmup must be <= steps"),
        ({"val_fraction": 1.0}, "val_fraction must be < 1.0"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"document_mask": 1}, "document_mask must be true or false"),
    ],
)
def test_a_wrong_value_says_what_was_wrong_and_what_is_expected(values, message):
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig(**values)
    assert "\n" not in str(caught.value)


def test_a_wrong_value_names_the_flag_or_file_that_gave_it(tmp_path):
    with pytest.raises(UserError, match=r"from --learning-rate"):
        TrainConfig.from_layers(flags={"learning_rate": -1.0})
    file = tmp_path / "run.toml"
    for text, message in [
        ("[train]\nstep = 1\n", "unknown setting 'train.step' .*run.toml.*Did you mean"),
        ("[trian]\nsteps = 1\n", r"unknown section 'trian'. Did you mean \[train\]"),
        ("[train.deep]\nsteps = 1\n", "too deep"),
        ("steps = 1\n", "unknown section 'steps'. Put it under one of"),
        ("[train\n", "not valid TOML"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            TrainConfig.from_toml(file)
    with pytest.raises(UserError, match="cannot read the configuration"):
        TrainConfig.from_toml(tmp_path / "absent.toml")
    with pytest.raises(UserError, match=r"needs section\.key=value"):
        TrainConfig.from_layers(sets=["learning_rate"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])  # as Notepad and PowerShell save it
def test_a_byte_order_mark_before_a_configuration_is_no_part_of_it(encoding, tmp_path):
    file = tmp_path / "run.toml"
    file.write_bytes('[data]\r\npath = "B\u00fccher"\r\n'.encode(encoding))
    assert TrainConfig.from_toml(file).data.path == "B\u00fccher"


def test_a_configuration_in_another_charset_is_refused_with_what_to_do(tmp_path):
    file = tmp_path / "run.toml"
    file.write_bytes('[data]\npath = "B\u00fccher"\n'.encode("cp1252"))
    with pytest.raises(UserError, match=r"run\.toml.*byte 16 is not UTF-8\. Save the file as UTF-8"):
        TrainConfig.from_toml(file)


def test_the_effective_configuration_survives_toml_and_dictionaries(tmp_path):
    config = resolved(epochs=3, learning_rate=1e-3, path='a "quoted"\n\\path \x7f \u00e9')
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    sections = tomllib.loads(config.to_toml()).values()
    assert not any(isinstance(value, dict) for section in sections for value in section.values())
    again = TrainConfig.from_toml(file)
    assert again.data.path == config.data.path
    assert again.replace("test", epochs=None) == config.replace("test", epochs=None)
    assert again.resolve(again.model_config(512), 100_000).differences(config) == []
    assert TrainConfig.from_dict(config.to_dict(), config.sources) == config


def test_open_values_are_derived_by_a_rule_that_is_their_source():
    config = resolved(epochs=2, seq_len=100, batch_size=5, grad_accum=2, learning_rate=1e-3)
    assert config.train.steps == 200  # 2 epochs x 100,000 tokens / 1,000 tokens per step
    assert config.sources["train.steps"] == "derived: epochs x 100,000 tokens / 1,000 tokens per step"
    assert config.optim.min_lr == pytest.approx(1e-4) and config.optim.warmup == 20
    assert all(source for _, _, source, help_text in config.describe() if help_text)
    assert resolved(steps=1).optim.warmup == 0
    assert 1e-4 <= resolved(steps=1).optim.learning_rate <= 3e-3


def test_an_optimizer_brings_its_habits_unless_something_else_is_given():
    adamw, lion, free = (resolved(steps=10, **more) for more in ({}, {"optimizer": "lion"}, {"optimizer": "schedule_free"}))
    assert (adamw.optim.beta2, lion.optim.beta2, free.optim.beta2) == (0.95, 0.99, 0.95)
    assert (adamw.optim.schedule, lion.optim.schedule, free.optim.schedule) == ("cosine", "cosine", "constant")
    assert lion.optim.learning_rate == pytest.approx(adamw.optim.learning_rate / 5, rel=0.01) and "Chen et al. 2023" in lion.sources["optim.beta2"]
    given = resolved(steps=10, optimizer="schedule_free", schedule="wsd")
    assert given.optim.schedule == "wsd" and resolved(steps=10, optimizer="lion", beta2=0.98).optim.beta2 == 0.98
    assert lion.differences(adamw)[0].startswith("optim.optimizer: 'adamw' there, 'lion' here")


def test_a_ramp_needs_microbatches_and_gives_epochs_more_steps():
    plain, ramped = (resolved(epochs=2, seq_len=100, batch_size=5, grad_accum=4, **more) for more in ({}, {"batch_ramp": 40}))
    assert plain.train.steps == 100 and ramped.train.steps == 121  # 14, 13 and 13 updates of 1, 2 and 3 microbatches, then 81 of 4
    with pytest.raises(UserError, match=r"train\.batch_ramp needs grad_accum of at least 2, got 1"):
        TrainConfig(batch_ramp=10)
    with pytest.raises(UserError, match=r"optim\.ema and the optimizer schedule_free exclude each other"):
        TrainConfig(optimizer="schedule_free", ema=0.9)


def test_with_the_plateau_schedule_the_evaluations_are_part_of_the_run():
    assert resolved(steps=10, eval_every=2).differences(resolved(steps=10, eval_every=3)) == []
    lines = resolved(steps=10, eval_every=2, schedule="plateau").differences(resolved(steps=10, eval_every=3, schedule="plateau"))
    assert len(lines) == 1 and lines[0].startswith("train.eval_every: 3 there, 2 here")


def test_every_setting_has_a_help_sentence_and_a_unique_name():
    assert all(each.help.endswith((".", ")")) for each in SETTINGS.values())
    assert len({key.partition(".")[2] for key in SETTINGS}) == len(SETTINGS)


def test_differences_list_what_changes_the_weights_and_nothing_else():
    config = resolved(steps=10)
    assert config.differences(resolved(steps=10, threads=3, keep=9, sample_every=2)) == []
    (line,) = resolved(steps=10, beta2=0.5).differences(config)
    assert line.startswith("optim.beta2: 0.95 there, 0.5 here")


def test_a_derived_value_is_taken_from_the_stored_run_instead_of_being_a_difference():
    stored = resolved(steps=10).replace("derived: other machine", precision="bf16")
    here = resolved(steps=10).replace("derived: this machine", precision="fp32")
    assert here.differences(stored) == []
    assert here.adopt(stored).train.precision == "bf16"


def test_model_sizes_start_from_the_preset_and_follow_what_is_given():
    config = TrainConfig(preset="cllm-1m", num_layers=2, seq_len=64).model_config(300)
    assert (config.num_layers, config.embed_dim, config.vocab_size, config.max_seq_len) == (2, 128, 300, 256)
    small = TrainConfig(embed_dim=32, num_layers=1, num_heads=2, seq_len=16).model_config(300)
    assert (small.embed_dim, small.head_dim, small.max_seq_len, small.qk_norm) == (32, 16, 16, False)
    with pytest.raises(UserError, match="seq_len must be <= max_seq_len"):
        TrainConfig(seq_len=64, max_seq_len=32).model_config(300)
    with pytest.raises(UserError, match="unknown preset"):
        TrainConfig(preset="cllm-9t").model_config(300)


@pytest.mark.parametrize(
    ("given", "heads", "kv_heads"),
    [
        ({"embed_dim": 64}, 2, 2),  # the usual six do not divide it
        ({"embed_dim": 96}, 6, 6),
        ({"embed_dim": 640}, 10, 10),
        ({"embed_dim": 256, "preset": "cllm-1m"}, 4, 2),
        ({"embed_dim": 64, "num_heads": 4}, 4, 4),
        ({"embed_dim": 64, "head_dim": 16}, 6, 6),
    ],
)
def test_heads_fit_a_width_that_is_given_alone(given, heads, kv_heads):
    model = TrainConfig(seq_len=16, **given).model_config(300)
    assert (model.num_heads, model.kv_heads) == (heads, kv_heads)


def test_an_architecture_changes_a_model_of_any_size():
    config = TrainConfig(preset="cllm-1m", architecture="fast", seq_len=64)
    model = config.model_config(300)
    assert (model.embed_dim, model.ngram_tables, model.qk_norm) == (128, ((2, 8192), (3, 8192)), True)
    small = TrainConfig(architecture="fast", embed_dim=32, num_layers=1, num_heads=2, trigram_rows=0, seq_len=16).model_config(20)
    assert small.ngram_tables == ((2, 400),) and not small.qk_norm  # as many rows as there are pairs; what is given stays
    plain = TrainConfig(preset="cllm-1m", seq_len=64)
    found, plain = config.resolve(model, 10**9), plain.resolve(plain.model_config(300), 10**9)
    assert found.sources["model.trigram_rows"] == "derived: architecture fast" and found.model.trigram_rows == 8192
    assert found.train.steps == plain.train.steps  # tables need no more tokens
    assert TrainConfig.from_dict(found.to_dict(), found.sources).resolve(model, 10**9).differences(found) == []
    with pytest.raises(UserError, match="bigram_rows=8192"):
        TrainConfig(preset="gpt2", architecture="fast").model_config(300)
    with pytest.raises(UserError, match="architecture must be one of fast"):
        TrainConfig(architecture="slow")


@pytest.mark.parametrize(
    ("features", "precision"), [((), "fp32"), (("avx2", "avx512f"), "fp32"), (("avx512_bf16",), "bf16"), (("avx512_bf16", "amx_bf16"), "bf16")]
)
def test_precision_is_bf16_where_the_processor_multiplies_it(monkeypatch, features, precision):
    monkeypatch.setattr(compiler, "cpu_features", lambda: frozenset(features))
    found = resolved(precision="auto", device="cpu")
    assert found.train.precision == precision and found.sources["train.precision"].startswith("derived: this machine")
