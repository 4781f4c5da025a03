//! rustbpe: trains a byte-level BPE tokenizer and applies it.
//!
//! `split` cuts text into words, `words` counts them in parallel, `train` learns merges from the counts, `encode`
//! applies them. `loss`, `rowwise`, `attention` and `adamw`, with `threads`, have another purpose: a model on a CPU.
//! None of these knows Python; `py` is the extension module.

mod adamw;
mod attention;
mod encode;
mod loss;
mod py;
mod rowwise;
mod split;
mod threads;
mod train;
mod words;

#[cfg(test)]
mod tests;
