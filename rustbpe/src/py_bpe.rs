//! The Python class `rustbpe.Tokenizer`: argument checks, conversions, and the GIL released around all real work.
//! A bad argument is a ValueError; an error raised by the user's iterator is passed on as it is.

use crate::bpe::encode::{Encoded, Encoder};
use crate::bpe::split::{Splitter, DEFAULT_PATTERN, FAST_PATTERNS};
use crate::bpe::train::learn_tokens;
use crate::bpe::words::{count_words, Batch};
use crate::bpe::Error;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyIterator, PyString};
use std::iter::once;

const BATCH_BYTES: usize = 1 << 20; // a batch is closed at this size, however few texts it holds: memory stays flat
const MAX_THREADS: usize = 1024;

type Any<'py> = Bound<'py, PyAny>;

fn value_error<T>(message: String) -> PyResult<T> {
    Err(PyValueError::new_err(message))
}

/// Python's own error if it is one, else a ValueError.
fn to_python(error: Error) -> PyErr {
    match error.downcast::<PyErr>() {
        Ok(error) => *error,
        Err(error) => PyValueError::new_err(error.to_string()),
    }
}

/// An integer argument within `min..=max`.
fn integer(name: &str, value: &Any<'_>, min: usize, max: usize) -> PyResult<usize> {
    match value.extract::<usize>() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => value_error(format!("{name} must be an integer from {min} to {max}, but is {value}")),
    }
}

fn thread_count(value: Option<&Any<'_>>) -> PyResult<usize> {
    match value {
        Some(value) => integer("num_threads", value, 1, MAX_THREADS),
        None => Ok(std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)),
    }
}

/// The split pattern: as given, or GPT-4's with numbers of two digits.
fn split_pattern(value: Option<&Any<'_>>) -> PyResult<String> {
    let Some(value) = value else { return Ok(DEFAULT_PATTERN.to_string()) };
    value.extract().or_else(|_| value_error(format!("pattern must be a str, but is {value}")))
}

/// The UTF-8 text of a Python string, without a copy. A lone surrogate is a UnicodeEncodeError, which is a ValueError.
fn text(value: &Any<'_>) -> PyResult<PyBackedStr> {
    match value.cast::<PyString>() {
        Ok(string) => string.clone().try_into(),
        Err(_) => value_error(format!("texts must be str, but one is {}: {value}", value.get_type())),
    }
}

fn iterate<'py>(values: &Any<'py>) -> PyResult<Bound<'py, PyIterator>> {
    if values.is_instance_of::<PyString>() {
        return value_error("one str was given where several are needed: put it in a list".to_string());
    }
    values.try_iter().or_else(|_| value_error(format!("texts must be an iterable of str, not {}", values.get_type())))
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
    fn trained(&self) -> PyResult<&Encoder> {
        let message = "the tokenizer is not trained: call train_from_iterator first";
        self.encoder.as_ref().ok_or_else(|| PyValueError::new_err(message))
    }

    fn encode_all(&self, py: Python<'_>, texts: &Any<'_>, num_threads: Option<&Any<'_>>) -> PyResult<Vec<Encoded>> {
        let encoder = self.trained()?;
        let num_threads = thread_count(num_threads)?;
        let texts = iterate(texts)?.map(|value| text(&value?)).collect::<PyResult<Vec<_>>>()?;
        py.detach(|| encoder.encode_batch(&texts, num_threads)).map_err(to_python)
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
    fn from_ranks(py: Python<'_>, ranks: &Any<'_>, pattern: Option<&Any<'_>>) -> PyResult<Self> {
        let pattern = split_pattern(pattern)?;
        let splitter = Splitter::new(&pattern).map_err(to_python)?;
        let ranks: Vec<(Vec<u8>, u64)> =
            ranks.extract().or_else(|error| value_error(format!("ranks must be a list of (bytes, int): {error}")))?;
        let encoder = py.detach(|| Encoder::from_ranks(splitter, ranks)).map_err(to_python)?;
        Ok(Tokenizer { pattern, encoder: Some(encoder) })
    }

    /// Learns up to `vocab_size` tokens, the 256 bytes among them, from an iterable of str, which is read as a stream:
    /// at most `buffer_size` texts (or about a megabyte) at a time. The highest count is merged first, among equals
    /// the pair with the smallest ids; the number of threads makes no difference.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=None, pattern=None, num_threads=None))]
    fn train_from_iterator(
        &mut self, py: Python<'_>, iterator: &Any<'_>, vocab_size: &Any<'_>, buffer_size: Option<&Any<'_>>,
        pattern: Option<&Any<'_>>, num_threads: Option<&Any<'_>>,
    ) -> PyResult<()> {
        let vocab_size = integer("vocab_size", vocab_size, 256, 1 << 31)?;
        let buffer_size = buffer_size.map_or(Ok(8192), |value| integer("buffer_size", value, 1, 1 << 31))?;
        let num_threads = thread_count(num_threads)?;
        let pattern = split_pattern(pattern)?;
        let splitter = Splitter::new(&pattern).map_err(to_python)?;
        let mut stream = Some(iterate(iterator)?.unbind());
        let next_batch = |batch: &mut Batch| Ok(Python::attach(|py| fill(py, &mut stream, batch, buffer_size))?);
        let check = || Ok(Python::attach(|py| py.check_signals())?);
        let learn = || learn_tokens(count_words(&splitter, num_threads, next_batch)?, vocab_size, check);
        let tokens = py.detach(learn).map_err(to_python)?;
        self.pattern = pattern;
        self.encoder = Some(Encoder::new(splitter, tokens));
        Ok(())
    }

    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    /// The patterns that are split by hand, the default first. Any other one goes through a regex engine, which takes
    /// about ten times as long.
    #[staticmethod]
    fn fast_patterns() -> Vec<&'static str> {
        FAST_PATTERNS.map(|(pattern, _)| pattern).to_vec()
    }

    /// [(bytes of a token, its id), ...] in the order of ids, as tiktoken takes them.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> PyResult<Vec<(Bound<'py, PyBytes>, u32)>> {
        let tokens = &self.trained()?.tokens;
        Ok(tokens.iter().zip(0..).map(|(token, id)| (PyBytes::new(py, token), id)).collect())
    }

    /// The number of tokens; 0 before training.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder.as_ref().map_or(0, |encoder| encoder.tokens.len())
    }

    fn encode(&self, py: Python<'_>, text: &Any<'_>) -> PyResult<Vec<u32>> {
        let encoder = self.trained()?;
        let text = self::text(text)?;
        py.detach(|| encoder.encode(&text)).map_err(to_python)
    }

    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode(&self, py: Python<'_>, texts: &Any<'_>, num_threads: Option<&Any<'_>>) -> PyResult<Vec<Vec<u32>>> {
        let encoded = self.encode_all(py, texts, num_threads)?;
        Ok(encoded.into_iter().flat_map(Encoded::split).collect())
    }

    /// All ids of all texts as bytes of little-endian u32, and as bytes of i64 where each text starts, with the end
    /// of the last: `ids = np.frombuffer(ids, "<u4")`, then text i is `ids[offsets[i]:offsets[i + 1]]`.
    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_to_buffer<'py>(
        &self, py: Python<'py>, texts: &Any<'py>, num_threads: Option<&Any<'py>>,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let encoded = self.encode_all(py, texts, num_threads)?;
        let num_ids: usize = encoded.iter().map(|chunk| chunk.ids.len()).sum();
        let ids = PyBytes::new_with(py, 4 * num_ids, |buffer| {
            let ids = encoded.iter().flat_map(|chunk| &chunk.ids);
            buffer.chunks_exact_mut(4).zip(ids).for_each(|(out, id)| out.copy_from_slice(&id.to_le_bytes()));
            Ok(())
        })?;
        let mut end = 0i64;
        let ends = encoded.iter().flat_map(|chunk| &chunk.lens).map(|&len| {
            end += len as i64;
            end
        });
        let offsets: Vec<u8> = once(0).chain(ends).flat_map(i64::to_le_bytes).collect();
        Ok((ids, PyBytes::new(py, &offsets)))
    }
}

/// Fills a batch from the stream, which is None once it has ended; false when there was nothing left.
fn fill(py: Python<'_>, stream: &mut Option<Py<PyIterator>>, batch: &mut Batch, buffer_size: usize) -> PyResult<bool> {
    py.check_signals()?;
    let Some(iterator) = stream.as_ref() else { return Ok(false) };
    let mut iterator = iterator.bind(py).clone();
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
