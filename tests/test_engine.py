"""Cached generation against the full forward pass, rows against rows alone, sampling, and tools."""

import pytest
import torch

from nanochat import kv_cache
from nanochat.decoder import Decoder
from nanochat.engine import Engine
from nanochat.kv_cache import KVCache
from nanochat.sampling import Sampling
from nanochat.streaming import TextStream, ToolState
from tests.tiny import tiny_model


@pytest.fixture
def engine(tokenizer):
    return Engine(tiny_model(tokenizer.get_vocab_size(), 64).eval(), tokenizer)


def cache_for(model, num_rows=1, **kwargs):
    return KVCache(model.config, num_rows, model.config.sequence_len, model.device, torch.float32, **kwargs)


@pytest.mark.parametrize("shape", [dict(n_kv_head=4), dict(n_kv_head=2), dict(n_kv_head=1),
                                   dict(n_kv_head=2, value_embeds=True)])
@pytest.mark.parametrize("split", [(20,), (1,) * 20, (7, 13), (13, 1, 6), (1, 19)])
@torch.no_grad()
def test_cached_logits_equal_the_full_forward_for_any_split(split, shape):
    model = tiny_model(**shape).eval()
    ids = torch.randint(0, 100, (2, 20))
    cache, parts, start = cache_for(model, num_rows=2, length=4), [], 0
    for T in split:
        parts.append(model(ids[:, start: start + T], kv_cache=cache))
        start += T
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache():
    model = tiny_model().eval()
    prompts = [torch.randint(0, 100, (1, T)) for T in (3, 11, 6)]
    cache, single = cache_for(model, num_rows=3, length=4), cache_for(model)
    for row, prompt in enumerate(prompts):
        single.lengths = [0]
        model(prompt, kv_cache=single)
        cache.copy_row(row, single, 0)
    new = torch.randint(0, 100, (3, 1))
    batched = model(new, kv_cache=cache)
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat((prompt, new[row: row + 1]), dim=1))[:, -1]
        torch.testing.assert_close(batched[row], alone, atol=1e-5, rtol=1e-5)


def test_a_cache_that_cannot_grow_stays_as_it_is(monkeypatch):
    cache = cache_for(tiny_model(), length=4)
    real = kv_cache.zeros

    def second_fails(*arguments):
        made.append(1)
        if len(made) == 2:
            raise torch.OutOfMemoryError("pretended")
        return real(*arguments)
    made = []
    monkeypatch.setattr(kv_cache, "zeros", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve(20)
    assert cache.k.size(3) == cache.v.size(3) == 4
    cache.reserve(20)
    assert cache.k.size(3) == cache.v.size(3) == 20


def test_cache_growth_keeps_contents_and_refuses_overflow():
    model = tiny_model()
    cache = cache_for(model, length=4)
    with torch.no_grad():
        model(torch.randint(0, 100, (1, 4)), kv_cache=cache)
        before = cache.k.clone()
        model(torch.randint(0, 100, (1, 9)), kv_cache=cache)
    assert torch.equal(cache.k[:, :, :, :4], before) and cache.k.size(3) >= 13
    with pytest.raises(ValueError, match="holds 32 tokens per row, 33 needed"):
        cache.begin(20)


def greedy_reference(model, ids, n, stop):
    """Uncached greedy decoding."""
    ids, new = list(ids), []
    while len(new) < n and (not new or new[-1] not in stop):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return new


def test_greedy_generation_equals_uncached_decoding(engine, tokenizer):
    prompt = tokenizer.encode("The old mill", prepend="<|bos|>")
    new = [column[0] for column, _ in engine.generate(prompt, max_tokens=12, temperature=0)]
    assert new == greedy_reference(engine.model, prompt, 12, engine.stop_tokens)


def test_generation_from_a_lone_bos(engine, tokenizer):
    sequences, masks = engine.generate_batch([tokenizer.get_bos_token_id()], max_tokens=5)
    assert len(sequences[0]) <= 6 and masks[0][0] == 0


def test_samples_differ_from_their_first_token_on_and_repeat_by_seed(engine, tokenizer):
    prompt = tokenizer.encode("A", prepend="<|bos|>")
    first, again, other = (list(engine.generate(prompt, 16, max_tokens=4, temperature=2.0, seed=s)) for s in (1, 1, 2))
    assert first == again and first != other
    assert len(set(first[0][0])) > 1


def test_rows_are_the_same_alone_and_in_a_crowd(engine, tokenizer):
    texts = ["One", "The fox and the", "A", "It was a dark and", "Why", "two", "three four", "x"]
    prompts = [tokenizer.encode(text, prepend="<|bos|>") for text in texts]

    def rows():
        for i, prompt in enumerate(prompts):
            sampling = [Sampling(0), Sampling(1.0, seed=i), Sampling(0.7, top_k=5, seed=i),
                        Sampling(1.3, top_p=0.8, seed=i)][i % 4]
            yield engine.make_row(prompt, sampling, max_tokens=5 + 3 * i)

    crowd = list(rows())
    finished = list(engine.generate_rows(crowd, num_rows=3))
    assert len(finished) == len(prompts)
    for alone, row in zip(rows(), crowd, strict=True):
        list(engine.generate_rows([alone]))
        assert row.tokens == alone.tokens and row.finish_reason == alone.finish_reason


def test_calls_share_a_decoder_one_after_another(engine, tokenizer):
    prompt = tokenizer.encode("The fox", prepend="<|bos|>")

    def columns(num_samples):
        return engine.generate(prompt, num_samples, max_tokens=5, temperature=1.0)

    expected = [list(columns(1)), list(columns(3))]
    decoder = engine._idle
    assert list(columns(1)) == expected[0] and engine._idle is decoder
    outer = columns(3)  # one call within another, and one that is given up, get and leave a decoder of their own
    pairs = [(next(outer), list(columns(1))), (next(outer), list(columns(3)))]
    assert [first for first, _ in pairs] == expected[1][:2] and [whole for _, whole in pairs] == expected
    outer.close()
    assert list(columns(3)) == expected[1]
    with torch.no_grad():
        engine.model.lm_head.weight.neg_()
    assert list(columns(1)) != expected[0]  # nothing of what the model was is kept


def test_rows_that_end_apart_after_the_cache_has_grown(tokenizer):
    """The cache starts at 256 positions and grows within a forward pass; places move when a row ends."""
    engine = Engine(tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=320).eval(), tokenizer)
    lengths, prompt = (8, 12, 10), [tokenizer.get_bos_token_id()] + [65] * 250
    rows = [engine.make_row(prompt, Sampling(0), length, stop_tokens=()) for length in lengths]
    assert {len(row.tokens) for row in engine.generate_rows(rows, 3)} == set(lengths)
    shortest, longest, _ = rows
    assert longest.tokens[:8] == shortest.tokens


def test_decoder_stops_at_the_context(engine, tokenizer):
    prompt = tokenizer.encode("hello " * 60, prepend="<|bos|>")[:50]
    row = engine.make_row(prompt, Sampling(0), stop_tokens=())
    list(engine.generate_rows([row]))
    assert row.finish_reason == "length" and len(prompt) + len(row.tokens) == 64


def test_prompt_that_does_not_fit_is_refused(engine):
    with pytest.raises(ValueError, match="a prompt of 64 tokens does not fit: need 1 to 63"):
        list(engine.generate([0] * 64))


# -- tools


def test_tool_state_forces_the_result(tokenizer):
    state = ToolState(tokenizer)
    ids = [*tokenizer.encode("it is "), tokenizer.encode_special("<|python_start|>"), *tokenizer.encode("12*(3+4)"),
           tokenizer.encode_special("<|python_end|>")]
    forced = [state.feed(token) for token in ids]
    assert forced[:-1] == [[]] * (len(ids) - 1)
    assert forced[-1] == [tokenizer.encode_special("<|output_start|>"), *tokenizer.encode("84"),
                          tokenizer.encode_special("<|output_end|>")]


def test_tool_state_forces_nothing_for_a_bad_expression(tokenizer):
    state = ToolState(tokenizer)
    for text in ("import os", "1/0", ""):
        for token in (tokenizer.encode_special("<|python_start|>"), *tokenizer.encode(text)):
            assert state.feed(token) == []
        assert state.feed(tokenizer.encode_special("<|python_end|>")) == []


@pytest.mark.parametrize("limit, expected", [(2**29, 1), (0, 2)])
def test_little_work_is_done_by_one_thread(engine, monkeypatch, limit, expected):
    """Prompts and steps; afterwards the process has its threads back."""
    numbers = []
    monkeypatch.setattr(Decoder, "ONE_THREAD_WORK", limit)
    engine.model.transformer.wte.register_forward_hook(lambda *_: numbers.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine.generate_batch([1, 2], max_tokens=3, temperature=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(numbers) > 2 and set(numbers) == {expected}


class Scripted:
    """Stands in for a model: says a fixed list of tokens, one after the other, whatever it reads."""

    def __init__(self, script, model):
        self.script, self.config, self.device, self.cos = script, model.config, model.device, model.cos
        self.num_matrix_params = model.num_matrix_params
        self.prompt_length = None

    def __call__(self, ids, kv_cache, last_only):
        kv_cache.begin(ids.size(1))
        kv_cache.lengths[0] += ids.size(1)
        self.prompt_length = self.prompt_length or ids.size(1)
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[0, 0, self.script[kv_cache.lengths[0] - self.prompt_length]] = 9.0
        return logits


def test_generation_with_a_tool_call_masks_the_forced_tokens(engine, tokenizer):
    call = [tokenizer.encode_special("<|python_start|>"), *tokenizer.encode("2+3"),
            tokenizer.encode_special("<|python_end|>")]
    forced = [tokenizer.encode_special("<|output_start|>"), *tokenizer.encode("5"),
              tokenizer.encode_special("<|output_end|>")]
    end = tokenizer.encode_special("<|assistant_end|>")
    scripted = Scripted([*call, *[0] * len(forced), *tokenizer.encode("so 5"), end], engine.model)
    sequences, masks = Engine(scripted, tokenizer).generate_batch([1, 2], max_tokens=40, temperature=0)
    answer = tokenizer.encode("so 5")
    assert sequences[0] == [1, 2, *call, *forced, *answer]
    assert masks[0] == [0, 0, *[1] * len(call), *[0] * len(forced), *[1] * len(answer)]


# -- streaming


def test_stream_emits_whole_characters_and_no_special_tokens(tokenizer):
    text = "né 漢字 🙂 ok"
    stream = TextStream(tokenizer)
    ids = [tokenizer.get_bos_token_id(), *tokenizer.encode(text), tokenizer.encode_special("<|assistant_end|>")]
    pieces = [stream.feed(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert "\ufffd" not in "".join(pieces) and any(piece == "" for piece in pieces[1:-1])


def test_prompts_are_read_in_blocks(engine):
    decoder = Decoder(engine.model, 1, block=10)
    assert sum(1 for _ in decoder.prefill(list(range(35)))) == 4
    assert decoder.staging.lengths == [35]
