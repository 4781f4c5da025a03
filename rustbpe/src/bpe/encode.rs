//! Applies a merge table to text; the ids are exactly those of tiktoken with the same ranks and pattern.

use super::split::Splitter;
use super::words::{hash, is_short, key_of, locked, Interner, Key};
use super::Error;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Mutex;

const CACHE_BITS: u32 = 15; // 2^15 rows, 2 MB for each thread
const GROUP: usize = 32; // words are looked up in groups: the processor then waits for many of them at once
const CHUNK_BYTES: usize = 1 << 17; // texts are handed to threads in portions of about this size

/// The ids of a short word, in 32 bytes: a row of two is one cache line.
#[derive(Clone, Copy, Default)]
struct CachedWord {
    key: Key,      // 0 = empty
    len: u32,      // ids in use
    ids: [u32; 3], // words with more ids are rare and not cached
}

/// The cache of a thread that encodes, and its scratch space.
#[derive(Default)]
struct Worker {
    cache: Vec<[CachedWord; 2]>, // by hash; in each row the word seen last comes first
    cuts: Vec<u32>,              // of a short word: where its parts start and end
    ranks: Vec<u32>,             // and the rank of each pair of neighbouring parts
    next: Vec<u32>,              // of a long word, by start of a part: where the next part starts
    prev: Vec<u32>,              // and where the one before starts
    heap: BinaryHeap<Reverse<(u32, u32, u32)>>, // (rank, start, end) of pairs of parts
}

pub struct Encoder {
    splitter: Splitter,
    pub tokens: Interner,        // the number of a token is its rank
    byte_ids: [u32; 256],        // the id of each byte
    pair_ranks: Vec<u32>,        // the id of each pair of bytes, by `pair_index`; u32::MAX: it is no token
    max_token_len: u32,          // bytes
    workers: Mutex<Vec<Worker>>, // idle ones, which later calls use again
}

/// The ids of a run of texts, one after another.
#[derive(Default)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub lens: Vec<usize>, // ids of each text
}

impl Encoded {
    /// The ids of each text on its own.
    pub fn split(self) -> Vec<Vec<u32>> {
        let mut ids = self.ids.into_iter();
        self.lens.iter().map(|&len| ids.by_ref().take(len).collect()).collect()
    }
}

impl Encoder {
    /// Checks that the ranks are a table BPE can have produced.
    pub fn from_ranks(splitter: Splitter, mut ranks: Vec<(Vec<u8>, u64)>) -> Result<Self, Error> {
        ranks.sort_by_key(|(_, rank)| *rank);
        let mut tokens = Interner::default();
        for (i, (token, rank)) in ranks.iter().enumerate() {
            if *rank != i as u64 {
                return Err(
                    format!("ranks must be 0 to {}, each once, but rank {i} is missing", ranks.len() - 1).into()
                );
            }
            let is_known = |part: &[u8]| tokens.find_bytes(part).is_some();
            if (i < 256) != (token.len() == 1) {
                return Err(format!("the first 256 ranks must be the single bytes, but rank {i} is {token:?}").into());
            }
            if i >= 256 && !(1..token.len()).any(|cut| is_known(&token[..cut]) && is_known(&token[cut..])) {
                return Err(format!("token {token:?} of rank {i} does not split into two tokens of lower rank").into());
            }
            if tokens.insert_bytes(token) as usize != i {
                return Err(format!("token {token:?} has two ranks, the second is {i}").into());
            }
        }
        if tokens.len() < 256 {
            return Err(
                format!("the ranks must hold all 256 single bytes, but there are {} tokens", tokens.len()).into()
            );
        }
        Ok(Self::new(splitter, tokens))
    }

    pub fn new(splitter: Splitter, tokens: Interner) -> Self {
        let mut byte_ids = [0; 256];
        let mut pair_ranks = vec![u32::MAX; 1 << 16];
        for (token, id) in tokens.iter().zip(0..) {
            match *token {
                [byte] => byte_ids[byte as usize] = id,
                [first, second] => pair_ranks[pair_index(first, second)] = id,
                _ => {}
            }
        }
        let max_token_len = tokens.iter().map(<[u8]>::len).max().unwrap_or(0) as u32;
        Encoder { splitter, tokens, byte_ids, pair_ranks, max_token_len, workers: Mutex::default() }
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        Ok(self.with_worker(|worker| self.encode_chunk(&[text], worker))?.ids)
    }

    fn with_worker<T>(&self, f: impl FnOnce(&mut Worker) -> T) -> T {
        let idle = locked(&self.workers).pop();
        let mut worker = idle.unwrap_or_default();
        worker.cache.resize(1 << CACHE_BITS, Default::default()); // when it is a new one
        let result = f(&mut worker);
        locked(&self.workers).push(worker);
        result
    }

    fn encode_chunk<T: AsRef<str>>(&self, texts: &[T], worker: &mut Worker) -> Result<Encoded, Error> {
        let size: usize = texts.iter().map(|text| text.as_ref().len()).sum();
        let mut encoded = Encoded { ids: Vec::with_capacity(size / 4), lens: Vec::with_capacity(texts.len()) };
        for text in texts.iter().map(T::as_ref) {
            let before = encoded.ids.len();
            let mut words = Vec::with_capacity(GROUP);
            self.splitter.for_each(text, |start, end| {
                words.push((key_of(text.as_bytes(), start, end), start, end));
                if words.len() == GROUP {
                    self.encode_words(text.as_bytes(), &words, worker, &mut encoded.ids);
                    words.clear();
                }
            })?;
            self.encode_words(text.as_bytes(), &words, worker, &mut encoded.ids);
            encoded.lens.push(encoded.ids.len() - before);
        }
        Ok(encoded)
    }

    fn encode_words(&self, text: &[u8], words: &[(Key, usize, usize)], worker: &mut Worker, ids: &mut Vec<u32>) {
        for &(key, start, end) in words {
            let [first, second] = &mut worker.cache[cache_row(key)];
            if first.key != key {
                std::mem::swap(first, second);
            }
            if first.key != key || !is_short(key) {
                self.encode_word(text, (key, start, end), worker, ids);
                continue;
            }
            let len = ids.len() + first.len as usize;
            ids.extend_from_slice(&first.ids); // always three, which is faster than `len` of them
            ids.truncate(len);
        }
    }

    /// A word that is not in the cache.
    #[inline(never)]
    fn encode_word(
        &self, text: &[u8], (key, start, end): (Key, usize, usize), worker: &mut Worker, ids: &mut Vec<u32>,
    ) {
        let before = ids.len();
        match self.tokens.find(key, text, start, end) {
            Some(id) => ids.push(id),
            None if is_short(key) => self.merge_short(text, start, end, worker, ids),
            None => self.merge_long(text, start, end, worker, ids),
        }
        let new = &ids[before..];
        let cached = &mut worker.cache[cache_row(key)][0]; // seen longer ago, after the swap
        if is_short(key) && new.len() <= cached.ids.len() {
            cached.key = key;
            cached.len = new.len() as u32;
            cached.ids[..new.len()].copy_from_slice(new);
        }
    }

    /// The rank of the bytes `from..to` of a word that starts at `start`.
    #[inline(always)]
    fn rank(&self, text: &[u8], start: usize, from: u32, to: u32) -> Option<u32> {
        let from = start + from as usize;
        let to = start + to as usize;
        self.tokens.find(key_of(text, from, to), text, from, to)
    }

    /// BPE of a short word: the pair of lowest rank is merged first, the leftmost among equals.
    fn merge_short(&self, text: &[u8], start: usize, end: usize, worker: &mut Worker, ids: &mut Vec<u32>) {
        let rank = |from, to| self.rank(text, start, from, to).unwrap_or(u32::MAX);
        let Worker { cuts, ranks, .. } = worker;
        let bytes = &text[start..end];
        let before = ids.len();
        ids.extend(bytes.iter().map(|&byte| self.byte_ids[byte as usize])); // from `before` on: an id for each part
        cuts.clear();
        ranks.clear();
        cuts.extend(0..=bytes.len() as u32);
        ranks.extend(bytes.windows(2).map(|pair| self.pair_ranks[pair_index(pair[0], pair[1])]));
        while let Some((i, &lowest)) = ranks.iter().enumerate().min_by_key(|(_, &rank)| rank) {
            if lowest == u32::MAX {
                break;
            }
            ids[before + i] = lowest;
            ids.remove(before + i + 1);
            cuts.remove(i + 1);
            ranks.remove(i);
            for pair in i.saturating_sub(1)..ranks.len().min(i + 1) {
                ranks[pair] = rank(cuts[pair], cuts[pair + 2]);
            }
        }
    }

    /// The same for a long word, with the pairs in a heap: n bytes take n log n steps, even if they are a hundred
    /// thousand times the same letter.
    fn merge_long(&self, text: &[u8], start: usize, end: usize, worker: &mut Worker, ids: &mut Vec<u32>) {
        let Worker { next, prev, heap, .. } = worker;
        let pair = |from: u32, to: u32| {
            let rank = if to - from > self.max_token_len { None } else { self.rank(text, start, from, to) };
            rank.map(|rank| Reverse((rank, from, to)))
        };
        let end = (end - start) as u32;
        next.clear();
        prev.clear();
        next.extend(1..=end);
        prev.extend((0..=end).map(|i| i.wrapping_sub(1)));
        heap.extend((2..=end).filter_map(|to| pair(to - 2, to)));
        while let Some(Reverse((_, from, to))) = heap.pop() {
            // Stale unless two parts still start at `from` and end at `to`; a part merged away has next = 0.
            let middle = next[from as usize];
            if middle == 0 || middle >= to || next[middle as usize] != to {
                continue;
            }
            next[from as usize] = to;
            next[middle as usize] = 0;
            if to < end {
                prev[to as usize] = from;
                heap.extend(pair(from, next[to as usize]));
            }
            if from > 0 {
                heap.extend(pair(prev[from as usize], to));
            }
        }
        let mut part = 0;
        while part < end {
            ids.extend(self.rank(text, start, part, next[part as usize]));
            part = next[part as usize];
        }
    }

    /// Encodes many texts on `num_threads` threads: the results of chunks of the texts, in order.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], num_threads: usize) -> Result<Vec<Encoded>, Error> {
        let chunks = chunks_of(texts);
        let mut results: Vec<_> = chunks.iter().map(|_| Ok(Encoded::default())).collect();
        let num_threads = num_threads.min(chunks.len());
        let jobs = Mutex::new(chunks.into_iter().zip(&mut results));
        let next = || locked(&jobs).next(); // the lock is released before the work begins
        let work = || {
            self.with_worker(|worker| {
                while let Some((chunk, result)) = next() {
                    *result = self.encode_chunk(chunk, worker);
                }
            })
        };
        std::thread::scope(|scope| {
            (1..num_threads).for_each(|_| _ = scope.spawn(work));
            work();
        });
        results.into_iter().collect()
    }
}

/// The row of the cache that a word belongs to.
fn cache_row(key: Key) -> usize {
    (hash(key) >> (64 - CACHE_BITS)) as usize
}

/// Where `pair_ranks` has a pair of bytes.
fn pair_index(first: u8, second: u8) -> usize {
    (first as usize) << 8 | second as usize
}

/// Cuts a list of texts into runs of about CHUNK_BYTES.
fn chunks_of<T: AsRef<str>>(texts: &[T]) -> Vec<&[T]> {
    let mut chunks = Vec::new();
    let mut start = 0; // of the chunk that grows, in texts
    let mut size = 0; // and in bytes
    for (i, text) in texts.iter().enumerate() {
        size += text.as_ref().len();
        if size >= CHUNK_BYTES || i + 1 == texts.len() {
            chunks.push(&texts[start..=i]);
            start = i + 1;
            size = 0;
        }
    }
    chunks
}
