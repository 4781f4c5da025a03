//! Applies a merge table to text; the ids are exactly those of tiktoken with the same ranks and pattern.

use crate::split::Splitter;
use crate::words::{locked, mix, short_key, Interner};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

const CACHE_BITS: u32 = 15;
const CHUNK_BYTES: usize = 1 << 17; // texts are handed to threads in portions of about this size

/// The ids of a short word. A slot of the cache is 32 bytes, half a cache line.
#[derive(Clone, Copy, Default)]
struct CachedWord {
    key: u128,     // see `short_key`; 0 = empty
    len: u32,      // ids in use
    ids: [u32; 3], // words with more ids are rare and not cached
}

type Cache = Vec<CachedWord>;

pub struct Encoder {
    splitter: Splitter,
    pub tokens: Interner,      // the number of a token is its rank
    max_token_len: usize,      // bytes
    caches: Mutex<Vec<Cache>>, // one for each thread that ever encoded at the same time
}

/// The ids of a run of texts, one after another.
pub struct Encoded {
    pub ids: Vec<u32>,
    pub lens: Vec<usize>, // ids of each text
}

impl Encoded {
    /// The ids of each text on its own.
    pub fn split(self) -> Vec<Vec<u32>> {
        let mut rest = self.ids.as_slice();
        let take = |len| {
            let (ids, after) = rest.split_at(len);
            rest = after;
            ids.to_vec()
        };
        self.lens.into_iter().map(take).collect()
    }
}

impl Encoder {
    /// Checks that the ranks are a table BPE can have produced.
    pub fn from_ranks(splitter: Splitter, mut ranks: Vec<(Vec<u8>, u64)>) -> Result<Self, String> {
        ranks.sort_by_key(|(_, rank)| *rank);
        let mut tokens = Interner::default();
        for (i, (token, rank)) in ranks.iter().enumerate() {
            if *rank != i as u64 {
                return Err(format!("ranks must be 0 to {}, each once, but rank {i} is missing", ranks.len() - 1));
            }
            let is_known = |part: &[u8]| tokens.find(part).is_some();
            if (i < 256) != (token.len() == 1) {
                return Err(format!("the first 256 ranks must be the single bytes, but rank {i} is {token:?}"));
            }
            if i >= 256 && !(1..token.len()).any(|cut| is_known(&token[..cut]) && is_known(&token[cut..])) {
                return Err(format!("token {token:?} of rank {i} does not split into two tokens of lower rank"));
            }
            if tokens.insert(token) as usize != i {
                return Err(format!("token {token:?} has two ranks, the second is {i}"));
            }
        }
        if tokens.len() < 256 {
            return Err(format!("the ranks must hold all 256 single bytes, but there are {} tokens", tokens.len()));
        }
        Ok(Self::new(splitter, tokens))
    }

    pub fn new(splitter: Splitter, tokens: Interner) -> Self {
        let max_token_len = (0..tokens.len()).map(|id| tokens.get(id as u32).len()).max().unwrap_or(0);
        Encoder { splitter, tokens, max_token_len, caches: Mutex::default() }
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut ids = Vec::new();
        self.with_cache(|cache| self.encode_into(text, cache, &mut ids))?;
        Ok(ids)
    }

    fn with_cache<T>(&self, f: impl FnOnce(&mut Cache) -> T) -> T {
        let cache = locked(&self.caches).pop();
        let mut cache = cache.unwrap_or_else(|| vec![CachedWord::default(); 1 << CACHE_BITS]);
        let result = f(&mut cache);
        locked(&self.caches).push(cache);
        result
    }

    fn encode_into(&self, text: &str, cache: &mut Cache, ids: &mut Vec<u32>) -> Result<(), String> {
        let bytes = text.as_bytes();
        self.splitter.for_each(text, |start, end| {
            let Some(key) = short_key(bytes, start, end) else {
                return self.encode_word(&bytes[start..end], ids);
            };
            let slot = &mut cache[(mix(key) >> (64 - CACHE_BITS)) as usize];
            if slot.key != key {
                let before = ids.len();
                self.encode_word(&bytes[start..end], ids);
                let len = ids.len() - before;
                if len <= slot.ids.len() {
                    (slot.key, slot.len) = (key, len as u32);
                    slot.ids[..len].copy_from_slice(&ids[before..]);
                }
                return;
            }
            ids.extend_from_slice(&slot.ids[..slot.len as usize]);
        })
    }

    /// BPE of one word: the pair of lowest rank is merged first, the leftmost among equals. The pairs wait in a heap,
    /// so a word of n bytes takes n log n steps, also when it is one letter a hundred thousand times.
    fn encode_word(&self, word: &[u8], ids: &mut Vec<u32>) {
        if let Some(id) = self.tokens.find(word) {
            return ids.push(id);
        }
        let end = word.len();
        let mut next: Vec<usize> = (1..=end).collect(); // by start of a part: where the next one starts
        let mut prev: Vec<usize> = (0..=end).map(|i| i.wrapping_sub(1)).collect();
        let is_short = |from: usize, to: usize| to - from <= self.max_token_len;
        let rank = |from, to| if is_short(from, to) { self.tokens.find(&word[from..to]) } else { None };
        let mut heap: BinaryHeap<Reverse<(u32, usize, usize)>> = BinaryHeap::new(); // (rank, from, to)
        heap.extend((2..=end).filter_map(|to| Some(Reverse((rank(to - 2, to)?, to - 2, to)))));
        while let Some(Reverse((_, from, to))) = heap.pop() {
            // Stale unless two parts still start at `from` and end at `to`; a part merged away has next = 0.
            let middle = next[from];
            if middle == 0 || middle >= to || next[middle] != to {
                continue;
            }
            (next[from], next[middle]) = (to, 0);
            if to < end {
                prev[to] = from;
                heap.extend(rank(from, next[to]).map(|rank| Reverse((rank, from, next[to]))));
            }
            if from > 0 {
                let before = prev[from];
                heap.extend(rank(before, to).map(|rank| Reverse((rank, before, to))));
            }
        }
        let mut start = 0;
        while start < end {
            ids.extend(self.tokens.find(&word[start..next[start]])); // every part is a token
            start = next[start];
        }
    }

    /// Encodes many texts by `num_threads` threads, in order, in as many parts as suits; the ids do not depend on them.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], num_threads: usize) -> Result<Vec<Encoded>, String> {
        let chunks = chunks_of(texts);
        let next_chunk = AtomicUsize::new(0);
        let work = || {
            self.with_cache(|cache| {
                let mut done = Vec::new();
                loop {
                    let index = next_chunk.fetch_add(1, Ordering::Relaxed);
                    let Some(chunk) = chunks.get(index) else { return Ok(done) };
                    done.push((index, self.encode_chunk(chunk, cache)?));
                }
            })
        };
        let results: Vec<Result<Vec<_>, String>> = std::thread::scope(|scope| {
            let helpers: Vec<_> = (1..num_threads.min(chunks.len())).map(|_| scope.spawn(work)).collect();
            let own = work();
            let others = helpers.into_iter().map(|helper| helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
            std::iter::once(own).chain(others).collect()
        });
        let mut done: Vec<_> = results.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
        done.sort_by_key(|(index, _)| *index);
        Ok(done.into_iter().map(|(_, encoded)| encoded).collect())
    }

    fn encode_chunk<T: AsRef<str>>(&self, texts: &[T], cache: &mut Cache) -> Result<Encoded, String> {
        let mut encoded = Encoded { ids: Vec::new(), lens: Vec::with_capacity(texts.len()) };
        for text in texts {
            let before = encoded.ids.len();
            self.encode_into(text.as_ref(), cache, &mut encoded.ids)?;
            encoded.lens.push(encoded.ids.len() - before);
        }
        Ok(encoded)
    }
}

/// Cuts a list of texts into runs of about CHUNK_BYTES.
fn chunks_of<T: AsRef<str>>(texts: &[T]) -> Vec<&[T]> {
    let (mut chunks, mut start, mut size) = (Vec::new(), 0, 0);
    for (i, text) in texts.iter().enumerate() {
        size += text.as_ref().len();
        if size >= CHUNK_BYTES || i + 1 == texts.len() {
            chunks.push(&texts[start..=i]);
            (start, size) = (i + 1, 0);
        }
    }
    chunks
}
