//! Byte-level BPE: `split` cuts text into words, `words` counts them in parallel, `train` learns merges from the
//! counts, `encode` applies them.

#![forbid(unsafe_code)]

/// The error of a callback, or a message.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

pub mod encode;
pub mod split;
pub mod train;
pub mod words;

#[cfg(test)]
mod tests;
