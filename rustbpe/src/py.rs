//! The Python module: argument checks, conversions, and the GIL released around all real work.
//! A bad argument is a ValueError; an error raised by the user's iterator is passed on as it is.

use crate::adamw::{self, Rates, State};
use crate::attention::{attend, Shape, Tensors};
use crate::encode::Encoder;
use crate::loss::{loss_of_bf16, loss_of_f32, Bf16, Logit, Rows};
use crate::rowwise::{self, Op, Task};
use crate::split::{Splitter, DEFAULT_PATTERN};
use crate::train::learn_tokens;
use crate::words::{count_words, Batch};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyIterator, PyString};

const BATCH_BYTES: usize = 1 << 20; // a batch is closed at this size, however few texts it holds: memory stays flat
const MAX_THREADS: usize = 1024;

type Any<'py> = Bound<'py, PyAny>;
type Result<T> = std::result::Result<T, Failure>;

/// An error on its way to Python; messages of this crate become ValueError.
struct Failure(PyErr);

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Failure(PyValueError::new_err(message))
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Failure(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

/// An integer argument within `min..=max`.
fn integer(name: &str, value: &Any<'_>, min: usize, max: usize) -> Result<usize> {
    match value.extract::<usize>() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(format!("{name} must be an integer from {min} to {max}, but is {value}").into()),
    }
}

fn thread_count(value: Option<&Any<'_>>) -> Result<usize> {
    match value {
        Some(value) => integer("num_threads", value, 1, MAX_THREADS),
        None => Ok(std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)),
    }
}

/// The UTF-8 text of a Python string, without a copy.
fn text(value: &Any<'_>) -> Result<PyBackedStr> {
    let string = value.cast::<PyString>();
    let string = string.map_err(|_| format!("texts must be str, but one is {}: {value}", value.get_type()))?;
    Ok(string.clone().try_into()?) // a lone surrogate is a UnicodeEncodeError, which is a ValueError
}

/// The split pattern: as given, or GPT-4's with numbers of two digits.
fn split_pattern(value: Option<&Any<'_>>) -> Result<String> {
    match value {
        None => Ok(DEFAULT_PATTERN.to_string()),
        Some(value) => match value.extract::<String>() {
            Ok(pattern) => Ok(pattern),
            Err(_) => Err(format!("pattern must be a str, but is {value}").into()),
        },
    }
}

fn texts(values: &Any<'_>) -> Result<Vec<PyBackedStr>> {
    let values = iterate(values)?;
    values.map(|value| text(&value?)).collect()
}

fn iterate<'py>(values: &Any<'py>) -> Result<Bound<'py, PyIterator>> {
    if values.is_instance_of::<PyString>() {
        return Err("one str was given where several are needed: put it in a list".to_string().into());
    }
    values.try_iter().map_err(|_| format!("texts must be an iterable of str, not {}", values.get_type()).into())
}

/// A byte-level BPE tokenizer.
///
///     tokenizer = rustbpe.Tokenizer()
///     tokenizer.train_from_iterator(["some text", "more text"], vocab_size=300)
///     tokenizer.encode("more")
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    pattern: String,
    encoder: Option<Encoder>, // None before training
}

impl Tokenizer {
    fn trained(&self) -> Result<&Encoder> {
        let message = "the tokenizer is not trained: call train_from_iterator first";
        self.encoder.as_ref().ok_or_else(|| message.to_string().into())
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        Tokenizer { pattern: DEFAULT_PATTERN.to_string(), encoder: None }
    }

    /// A trained tokenizer from `get_mergeable_ranks()` and `get_pattern()`.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern=None))]
    fn from_ranks(py: Python<'_>, ranks: &Any<'_>, pattern: Option<&Any<'_>>) -> Result<Self> {
        let pattern = split_pattern(pattern)?;
        let splitter = Splitter::new(&pattern)?;
        let ranks: Vec<(Vec<u8>, u64)> =
            ranks.extract().map_err(|error| format!("ranks must be a list of (bytes, int): {error}"))?;
        let encoder = py.detach(|| Encoder::from_ranks(splitter, ranks))?;
        Ok(Tokenizer { pattern, encoder: Some(encoder) })
    }

    /// Learns up to `vocab_size` tokens, the 256 bytes among them, from an iterable of str, which is read as a stream:
    /// at most `buffer_size` texts (or about a megabyte) at a time. The highest count is merged first, among equals
    /// the pair with the smallest ids; the number of threads makes no difference.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=None, pattern=None, num_threads=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Any<'_>,
        vocab_size: &Any<'_>,
        buffer_size: Option<&Any<'_>>,
        pattern: Option<&Any<'_>>,
        num_threads: Option<&Any<'_>>,
    ) -> Result<()> {
        let vocab_size = integer("vocab_size", vocab_size, 256, 1 << 31)?;
        let buffer_size = buffer_size.map_or(Ok(8192), |value| integer("buffer_size", value, 1, 1 << 31))?;
        let num_threads = thread_count(num_threads)?;
        let pattern = split_pattern(pattern)?;
        let splitter = Splitter::new(&pattern)?;
        let mut stream = Some(iterate(iterator)?.unbind());
        let next_batch = |batch: &mut Batch| Python::attach(|py| fill(py, &mut stream, batch, buffer_size));
        let tokens = py.detach(|| {
            let words = count_words(&splitter, num_threads, next_batch)?;
            let check = || Python::attach(|py| py.check_signals()).map_err(Failure);
            learn_tokens(words, vocab_size, check)
        })?;
        (self.pattern, self.encoder) = (pattern, Some(Encoder::new(splitter, tokens)));
        Ok(())
    }

    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    /// [(bytes of a token, its id), ...] in the order of ids, as tiktoken takes them.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Result<Vec<(Bound<'py, PyBytes>, u32)>> {
        let tokens = &self.trained()?.tokens;
        Ok(tokens.iter().zip(0..).map(|(token, id)| (PyBytes::new(py, token), id)).collect())
    }

    /// The number of tokens; 0 before training.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder.as_ref().map_or(0, |encoder| encoder.tokens.len())
    }

    fn encode(&self, py: Python<'_>, text: &Any<'_>) -> Result<Vec<u32>> {
        let (encoder, text) = (self.trained()?, self::text(text)?);
        Ok(py.detach(|| encoder.encode(&text))?)
    }

    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode(&self, py: Python<'_>, texts: &Any<'_>, num_threads: Option<&Any<'_>>) -> Result<Vec<Vec<u32>>> {
        let (encoder, texts, num_threads) = (self.trained()?, self::texts(texts)?, thread_count(num_threads)?);
        let encoded = py.detach(|| encoder.encode_batch(&texts, num_threads))?;
        Ok(encoded.into_iter().flat_map(|chunk| chunk.split()).collect())
    }

    /// All ids of all texts as bytes of little-endian u32, and as bytes of i64 where each text starts, with the end
    /// of the last: `ids = np.frombuffer(ids, "<u4")`, then text i is `ids[offsets[i]:offsets[i + 1]]`.
    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_to_buffer<'py>(
        &self,
        py: Python<'py>,
        texts: &Any<'py>,
        num_threads: Option<&Any<'py>>,
    ) -> Result<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let (encoder, texts, num_threads) = (self.trained()?, self::texts(texts)?, thread_count(num_threads)?);
        let encoded = py.detach(|| encoder.encode_batch(&texts, num_threads))?;
        let num_ids: usize = encoded.iter().map(|chunk| chunk.ids.len()).sum();
        let ids = PyBytes::new_with(py, 4 * num_ids, |buffer| {
            let ids = encoded.iter().flat_map(|chunk| &chunk.ids);
            buffer.chunks_exact_mut(4).zip(ids).for_each(|(out, id)| out.copy_from_slice(&id.to_le_bytes()));
            Ok(())
        })?;
        let mut offset = 0i64;
        let mut offsets = offset.to_le_bytes().to_vec();
        for len in encoded.iter().flat_map(|chunk| &chunk.lens) {
            offset += *len as i64;
            offsets.extend(offset.to_le_bytes());
        }
        Ok((ids, PyBytes::new(py, &offsets)))
    }
}

/// Fills a batch from the stream, which is None once it has ended; false when there was nothing left.
fn fill(py: Python<'_>, stream: &mut Option<Py<PyIterator>>, batch: &mut Batch, buffer_size: usize) -> Result<bool> {
    py.check_signals()?;
    let Some(mut iterator) = stream.as_ref().map(|stream| stream.bind(py).clone()) else { return Ok(false) };
    while batch.ends.len() < buffer_size && batch.text.len() < BATCH_BYTES {
        let Some(value) = iterator.next() else {
            *stream = None; // an iterator is not asked again after its end
            break;
        };
        batch.text.push_str(&text(&value?)?);
        batch.ends.push(batch.text.len());
    }
    Ok(!batch.ends.is_empty())
}

/// Softmax cross-entropy of logits capped by cap * tanh(x / cap), times a weight a row, on `num_threads` threads.
/// Takes the addresses of contiguous tensors that no one else uses meanwhile: logits (rows, width) in bfloat16 or
/// float32, which become their gradient, targets (rows,) int64, weights (rows,) and losses (rows,) float32, the result.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn capped_cross_entropy(
    py: Python<'_>,
    logits: usize,
    targets: usize,
    weights: usize,
    losses: usize,
    is_bfloat16: bool,
    rows: usize,
    width: usize,
    cap: f32,
    num_threads: usize,
) -> Result<()> {
    if rows == 0 {
        return Ok(());
    }
    // sound if the caller keeps to the contract above: tensors are aligned, initialised, and do not overlap
    let targets = unsafe { std::slice::from_raw_parts(targets as *const i64, rows) };
    let weights = unsafe { std::slice::from_raw_parts(weights as *const f32, rows) };
    let losses = unsafe { std::slice::from_raw_parts_mut(losses as *mut f32, rows) };
    if targets.iter().any(|&target| target as usize >= width) {
        return Err(format!("a target is outside the vocabulary of {width} tokens").into());
    }
    py.detach(|| {
        if is_bfloat16 {
            let logits = unsafe { std::slice::from_raw_parts_mut(logits as *mut Bf16, rows * width) };
            loss_of_bf16(Rows { logits, targets, weights, losses }, cap, num_threads);
        } else {
            let logits = unsafe { std::slice::from_raw_parts_mut(logits as *mut f32, rows * width) };
            loss_of_f32(Rows { logits, targets, weights, losses }, cap, num_threads);
        }
    });
    Ok(())
}

/// Row by row, in bfloat16 or float32: 'norm' (value: eps), after a rotation where `angles` has its cosines and sines,
/// 'relu_square', or 'causal_softmax' (value: the scale). tensors: x and the result; or x (of causal_softmax, the
/// result), the gradient by the result, and the gradient by x. Each is an address, as above, and strides; their sizes
/// are (batch, tokens, heads, width), those of the angles, in float32, (batch, tokens, 1, width / 2).
#[pyfunction]
#[pyo3(signature = (op, tensors, sizes, is_bfloat16, num_threads, value=0.0, angles=None))]
#[allow(clippy::too_many_arguments)]
fn row_op(
    py: Python<'_>,
    op: &str,
    tensors: Vec<(usize, [usize; 3])>,
    sizes: [usize; 4],
    is_bfloat16: bool,
    num_threads: usize,
    value: f32,
    angles: Option<[(usize, [usize; 3]); 2]>,
) -> Result<()> {
    let rows = |(address, strides)| rowwise::Rows { address, strides };
    let (x, dy, out) = match tensors[..] {
        [x, out] => (rows(x), None, rows(out)),
        [x, dy, out] => (rows(x), Some(rows(dy)), rows(out)),
        _ => return Err(format!("{} tensors: need 2, or 3 for the gradient", tensors.len()).into()),
    };
    let op = match (op, angles) {
        ("norm", None) => Op::Norm { eps: value },
        ("norm", Some([cos, sin])) => Op::RotaryNorm { eps: value, cos: rows(cos), sin: rows(sin) },
        ("relu_square", None) => Op::ReluSquare,
        ("causal_softmax", None) if sizes[1] <= sizes[3] => Op::CausalSoftmax { scale: value },
        _ => return Err(format!("there is no {op} of this kind").into()),
    };
    let task = Task { op, x, dy, out, sizes: [sizes[0], sizes[1], sizes[2]], width: sizes[3] };
    let run = if is_bfloat16 { rowwise::run::<Bf16> } else { rowwise::run::<f32> };
    py.detach(|| unsafe { run(task, num_threads) }); // sound if the caller keeps to the contract
    Ok(())
}

/// Attention of one token a row: q and out (rows, heads, dim); k and v with the first lengths[row] positions of each
/// row and key head, in bfloat16 or float32; the addresses of tensors, as above. sizes: (heads, key heads, dim),
/// strides: numbers from a row, and from a key head, to the next.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn one_token_attention(
    py: Python<'_>,
    q: usize,
    k: usize,
    v: usize,
    out: usize,
    is_bfloat16: bool,
    lengths: Vec<usize>,
    sizes: (usize, usize, usize),
    strides: (usize, usize),
    num_threads: usize,
) {
    let run = if is_bfloat16 { attend_to_addresses::<Bf16> } else { attend_to_addresses::<f32> };
    let ((heads, kv_heads, dim), (row_stride, head_stride)) = (sizes, strides);
    let shape = Shape { heads, kv_heads, row_stride, head_stride, dim };
    py.detach(|| run([q, k, v, out], &lengths, shape, num_threads));
}

fn attend_to_addresses<L: Logit>(addresses: [usize; 4], lengths: &[usize], shape: Shape, num_threads: usize) {
    let [q, k, v, out] = addresses;
    let (size, longest) = (lengths.len() * shape.heads * shape.dim, lengths.iter().max().copied().unwrap_or(0));
    if size == 0 {
        return;
    }
    // up to the end of the last row's last head
    let cached =
        (lengths.len() - 1) * shape.row_stride + (shape.kv_heads - 1) * shape.head_stride + longest * shape.dim;
    // sound if the caller keeps to the contract: tensors are aligned, initialised, and do not overlap
    let tensors = unsafe {
        Tensors {
            q: std::slice::from_raw_parts(q as *const L, size),
            k: std::slice::from_raw_parts(k as *const L, cached),
            v: std::slice::from_raw_parts(v as *const L, cached),
            out: std::slice::from_raw_parts_mut(out as *mut L, size),
            first: 0,
        }
    };
    attend(tensors, lengths, shape, num_threads);
}

/// One step of AdamW on `size` float32 numbers: the addresses, as above, of the parameters, their gradient, and its
/// running means, plain and squared; all but the gradient change. `step` counts from 1.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn adamw_update(
    py: Python<'_>,
    addresses: [usize; 4],
    size: usize,
    step: i32,
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    num_threads: usize,
) {
    let (beta1, beta2) = betas;
    let rates = Rates {
        lr: (lr / (1.0 - beta1.powi(step))) as f32,
        decay: (1.0 - lr * weight_decay) as f32,
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        correction2: (1.0 - beta2.powi(step)) as f32,
        eps: eps as f32,
    };
    let [param, grad, exp_avg, exp_avg_sq] = addresses;
    if size == 0 {
        return;
    }
    // sound if the caller keeps to the contract: tensors are aligned, initialised, and do not overlap
    let state = unsafe {
        State {
            param: std::slice::from_raw_parts_mut(param as *mut f32, size),
            grad: std::slice::from_raw_parts(grad as *const f32, size),
            exp_avg: std::slice::from_raw_parts_mut(exp_avg as *mut f32, size),
            exp_avg_sq: std::slice::from_raw_parts_mut(exp_avg_sq as *mut f32, size),
        }
    };
    py.detach(|| adamw::update(state, rates, num_threads));
}

#[pymodule(name = "rustbpe")]
mod module {
    #[pymodule_export]
    use super::{adamw_update, capped_cross_entropy, one_token_attention, row_op, Tokenizer};
}
