//! The Python module: argument checks, conversions, and the GIL released around all real work.
//! A bad argument is a ValueError; an error raised by the user's iterator is passed on as it is.

use crate::bpe::encode::Encoder;
use crate::bpe::split::{Splitter, DEFAULT_PATTERN};
use crate::bpe::train::learn_tokens;
use crate::bpe::words::{count_words, Batch};
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
pub struct Tokenizer {
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
        &mut self, py: Python<'_>, iterator: &Any<'_>, vocab_size: &Any<'_>, buffer_size: Option<&Any<'_>>,
        pattern: Option<&Any<'_>>, num_threads: Option<&Any<'_>>,
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
        &self, py: Python<'py>, texts: &Any<'py>, num_threads: Option<&Any<'py>>,
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
