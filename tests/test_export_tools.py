"""
Exported folders in tools that the development packages do not hold; each test is skipped without its tool:

    uv pip install "mlx[cpu]" mlx-lm trl peft "lm-eval[hf]" onnxruntime onnxscript
"""

import pytest
import torch

from nanochat.checkpoint_manager import load_checkpoint
from nanochat.loss_eval import document_windows, evaluate_bpb, window_batches
from nanochat.tokenizer import get_token_bytes
from scripts import import_hf
from tests import exports

EXCHANGES = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"},
     {"role": "assistant", "content": "The light of the harbour."}],
    [{"role": "user", "content": "12*3?"}, {"role": "assistant", "content": "36"},
     {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Still 36."}],
]


def test_mlx_lm_gives_our_logits_and_prompts(small_base, small_models, small_tokenizer, tmp_path):
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    import mlx.core

    path = exports.export(small_base, tmp_path / "out", model_tag="kv2", flavor="mlx")
    theirs, their_tokenizer = mlx_lm.load(str(path))
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = small_models["kv2"](ids)
    logits = torch.tensor(theirs(mlx.core.array(ids.tolist())).tolist())
    torch.testing.assert_close(logits, ours, atol=1e-3, rtol=0)  # its norms add 1e-5, ours 1e-7

    question = [{"role": "user", "content": "Who are you?"}]
    prompt = their_tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert prompt == small_tokenizer.render_for_completion({"messages": question})
    stops = [small_tokenizer.encode_special(name) for name in ("<|assistant_end|>", "<|bos|>", "<|python_end|>")]
    assert their_tokenizer.eos_token_ids == set(stops)
    assert mlx_lm.generate(theirs, their_tokenizer, prompt, max_tokens=4)


def test_trl_trains_an_adapter_on_what_the_assistant_writes(small_base, small_tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl and peft")
    peft = pytest.importorskip("peft", reason="needs trl and peft")
    from datasets import Dataset

    path = exports.export(small_base, tmp_path / "out", model_tag="kv2")
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), assistant_only_loss=True, max_steps=12, per_device_train_batch_size=2,
        learning_rate=0.02, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=64, disable_tqdm=True)
    trainer = trl.SFTTrainer(
        model=str(path), args=settings, train_dataset=Dataset.from_list([{"messages": m} for m in EXCHANGES]),
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear"))

    batch = next(iter(trainer.get_train_dataloader()))
    trained = []
    for labels in batch["labels"].tolist():
        trained.append([token for token in labels if token != -100])
    expected = []
    for messages in EXCHANGES:
        ids, mask = small_tokenizer.render_conversation({"messages": messages})
        expected.append([token for token, wanted in zip(ids, mask, strict=True) if wanted])
    assert sorted(trained) == sorted(expected)

    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]


def test_trl_rewards_whole_answers_and_its_model_comes_back(
        small_base, small_models, small_tokenizer, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    path = exports.export(small_base, tmp_path / "out", model_tag="kv2")
    stops = {small_tokenizer.encode_special(name) for name in ("<|assistant_end|>", "<|bos|>", "<|python_end|>")}
    answers = []

    def many_different_tokens(completion_ids, **_):
        answers.extend(completion_ids)
        return [len(set(ids)) for ids in completion_ids]

    settings = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=32, num_generations=32,
        max_completion_length=24, learning_rate=0.01, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True, temperature=2.0)
    trainer = trl.GRPOTrainer(
        model=str(path), reward_funcs=many_different_tokens, args=settings,
        train_dataset=Dataset.from_list([{"prompt": messages[:1]} for messages in EXCHANGES for _ in range(2)]))
    trainer.train()

    # An answer is whole: it ends at its first stop token, which counts, or where it is cut
    assert len(answers) == 4 * 32
    assert not any(stops & set(ids[:-1]) for ids in answers)
    assert any(ids[-1] in stops for ids in answers)
    assert all(ids[-1] in stops for ids in answers if len(ids) < 24)

    # The folder that trl writes is a checkpoint here
    trainer.save_model(str(tmp_path / "trained"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name, value in {"model": str(tmp_path / "trained"), "stage": "rl", "model_tag": "trained"}.items():
        monkeypatch.setattr(import_hf, name, value)
    import_hf.main()
    ours, _, _ = load_checkpoint("rl", "cpu", "trained")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").eval()
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.eval()(ids), atol=1e-5, rtol=0)
        assert not torch.equal(ours(ids), small_models["kv2"](ids))


def test_onnxruntime_gives_our_logits(small_base, small_models, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime and onnxscript")
    pytest.importorskip("onnxscript", reason="needs onnxruntime and onnxscript")
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    path = exports.export(small_base, tmp_path / "out", model_tag="kv2")
    theirs = Logits(AutoModelForCausalLM.from_pretrained(path)).eval()
    example = torch.zeros(2, 9, dtype=torch.long)
    any_size = torch.export.Dim.DYNAMIC
    torch.onnx.export(theirs, (example,), str(tmp_path / "model.onnx"), input_names=["input_ids"], dynamo=True,
                      dynamic_shapes=({0: any_size, 1: any_size},), verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((1, 1), (3, 40), (1, 64)):
        ids = torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(1))
        logits, = session.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            ours = small_models["kv2"](ids)
        torch.testing.assert_close(torch.from_numpy(logits), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tag", ["kv2", "values"])
def test_lm_eval_finds_our_bits_per_byte(small_base, small_models, small_tokenizer, story, tag, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval[hf]")
    from dev.compare_lm_eval import lm_eval, write_tasks

    texts = [story[start : start + 160 + 40 * n] for n, start in enumerate(range(0, 1600, 400))]
    assert any(len(small_tokenizer.encode(text)) > 64 for text in texts)  # more than one window
    write_tasks(tmp_path, texts)
    path = exports.export(small_base, tmp_path / "out", model_tag=tag)
    model_args = f"pretrained={path},dtype=float32,add_bos_token=False,trust_remote_code=True"
    results, _ = lm_eval(tmp_path, "hf", "documents", model_args)

    bos = small_tokenizer.get_bos_token_id()
    documents = [document_windows(small_tokenizer.encode(text), bos, 64) for text in texts]
    batches = window_batches(enumerate(documents), 4, "cpu")
    ours = evaluate_bpb(small_models[tag], batches, get_token_bytes("cpu", small_tokenizer))
    assert results["bits_per_byte,none"] == pytest.approx(ours.value, rel=1e-5)
