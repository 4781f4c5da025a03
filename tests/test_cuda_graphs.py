"""Recorded decode steps against ordinary ones. Only the recording itself needs a GPU; a stand-in calls again."""

import pytest
import torch

from nanochat import cuda_graphs
from nanochat.decoder import Decoder
from nanochat.engine import Engine
from nanochat.inference import compile_decoding, prepare
from nanochat.sampling import Sampling
from tests.tiny import tiny_model


@pytest.fixture
def engine(tokenizer):
    vocab_size = tokenizer.get_vocab_size()
    model = tiny_model(vocab_size, 96, n_layer=6, value_embeds=True)
    return Engine(model.eval(), tokenizer)


def decode(engine, record, num_rows=5):
    """Rows that come and go, of many lengths, in a growing cache. Returns (their tokens, recorded numbers of rows)."""
    rows = [engine.make_row(range(1, 2 + 5 * i), Sampling(0.0), 4 + 7 * (i % 4), stop_tokens=()) for i in range(9)]
    decoder, waiting, shapes = Decoder(engine.model, num_rows, length=16), list(rows), set()
    decoder.graphs.record = record
    while waiting or decoder.rows:
        while waiting and decoder.num_free:
            row = waiting.pop(0)
            *_, (_, logits) = decoder.prefill(row.prompt)
            decoder.admit(row, logits)
        decoder.step()
        shapes |= set(decoder.graphs._steps)
    return [row.tokens for row in rows], shapes


def stand_in(function):
    """What recording promises: a call that does it all again and leaves the result in the same place."""
    output = function().clone()
    return lambda: output.copy_(function()), output


def test_recorded_steps_write_what_ordinary_ones_do(engine):
    ordinary, nothing = decode(engine, None)
    recorded, shapes = decode(engine, stand_in)
    assert recorded == ordinary and not nothing
    assert len(shapes) >= 2


def test_warming_up_records_every_number_of_rows(engine):
    decoder = Decoder(engine.model, 5)
    decoder.graphs.record = stand_in
    decoder.warm_up()
    assert set(decoder.graphs._steps) == {1, 2, 4, 5} and not decoder.rows and decoder.num_free == 5
    decoder.graphs.record = None
    decoder.graphs._steps.clear()
    decoder.warm_up()
    assert not decoder.graphs._steps


def test_compiled_steps_write_what_ordinary_ones_do(engine):
    """All layers, and all numbers of rows but one, share what is compiled."""
    def compiler(graph, inputs):
        compiled.append(graph)
        return graph.forward
    compiled, (ordinary, _) = [], decode(engine, None)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    prepare(engine.model)
    compile_decoding(engine.model, backend=compiler)
    recorded, shapes = decode(engine, stand_in)
    assert recorded == ordinary
    # a single row; the first other number of rows, then any; and a cache that has grown
    assert len(shapes) == 4 and len(engine.model.transformer.h) == 6 and 2 <= len(compiled) <= 4
    after = dict(engine.model.named_parameters())
    assert list(after) == list(before) and all(after[name].equal(p) for name, p in before.items())
    with torch.no_grad():  # parameters that RL writes are what the fused product reads
        engine.model.transformer.h[0].attn.c_q.weight.zero_()
    attn = engine.model.transformer.h[0].attn
    assert not attn.qkv[: attn.c_q.out_features].any() and attn.qkv.any()


def test_a_recording_that_fails_is_said_once_and_decoding_goes_on(engine, capsys):
    def fail(function):
        raise RuntimeError("no graphs here")
    assert decode(engine, fail)[0] == decode(engine, None)[0]
    assert capsys.readouterr().out == "note: decoding without CUDA graphs: no graphs here\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_records_and_replays(engine):
    engine.model.cuda().to(torch.float32)
    recorded, shapes = decode(engine, cuda_graphs.CudaRecorder(engine.model.device))
    assert shapes and recorded == decode(engine, None)[0]
