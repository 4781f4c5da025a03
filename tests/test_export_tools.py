"""
Exported folders in tools that the development packages do not hold; each test is skipped without its tool:

    uv pip install "mlx[cpu]" mlx-lm trl peft "lm-eval[hf]"
"""

import pytest
import torch

from nanochat.loss_eval import document_windows, evaluate_bpb, window_batches
from nanochat.tokenizer import get_token_bytes
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
