//! Words by number, and how often each occurs.

use crate::split::Splitter;
use hashbrown::hash_table::{Entry, HashTable};
use rustc_hash::FxHasher;
use std::hash::Hasher;
use std::sync::{mpsc, Mutex, MutexGuard, OnceLock};

/// Byte strings numbered in order of arrival, without an allocation per string.
#[derive(Default)]
pub struct Interner {
    bytes: Vec<u8>,        // all strings, one after another
    ends: Vec<usize>,      // where each ends in `bytes`
    table: HashTable<u32>, // number of a string, found by its hash
}

fn hash(word: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(word);
    hasher.finish()
}

fn slice<'a>(bytes: &'a [u8], ends: &[usize], id: u32) -> &'a [u8] {
    let id = id as usize;
    &bytes[if id == 0 { 0 } else { ends[id - 1] }..ends[id]]
}

impl Interner {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn get(&self, id: u32) -> &[u8] {
        slice(&self.bytes, &self.ends, id)
    }

    pub fn find(&self, word: &[u8]) -> Option<u32> {
        self.table.find(hash(word), |&id| self.get(id) == word).copied()
    }

    /// The number of `word`, a new one if it was not known.
    pub fn insert(&mut self, word: &[u8]) -> u32 {
        let Interner { bytes, ends, table } = self;
        let is_word = |&id: &u32| slice(bytes, ends, id) == word;
        match table.entry(hash(word), is_word, |&id| hash(slice(bytes, ends, id))) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => {
                let id = ends.len() as u32;
                entry.insert(id);
                bytes.extend_from_slice(word);
                ends.push(bytes.len());
                id
            }
        }
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
        self.table.clear();
    }
}

/// Words up to 15 bytes as one number, the length in the top byte, for a comparison in one step; never 0.
#[inline(always)]
pub fn short_key(text: &[u8], start: usize, end: usize) -> Option<u128> {
    let len = end - start;
    if len > 15 {
        return None;
    }
    let bytes = match text.get(start..start + 16) {
        Some(window) => u128::from_le_bytes(window.try_into().ok()?) & ((1 << (8 * len)) - 1),
        None => text[start..end].iter().rev().fold(0, |key, &byte| key << 8 | byte as u128), // near the end of the text
    };
    Some(bytes | (len as u128) << 120)
}

/// A well-mixed number from a short key; callers take the high bits.
#[inline(always)]
pub fn mix(key: u128) -> u64 {
    let folded =
        (key as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ ((key >> 64) as u64).wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
    (folded ^ (folded >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

// -----------------------------------------------------------------------------
// Counting, by several threads over a stream of batches

/// Words with their counts.
#[derive(Default)]
pub struct WordCounts {
    pub words: Interner,
    pub counts: Vec<u64>,
}

impl WordCounts {
    pub fn add(&mut self, word: &[u8], count: u64) {
        let id = self.words.insert(word) as usize;
        if id == self.counts.len() {
            self.counts.push(0);
        }
        self.counts[id] += count;
    }
}

/// Texts on their way to a worker, one after another in a single buffer.
#[derive(Default)]
pub struct Batch {
    pub text: String,
    pub ends: Vec<usize>, // where each text ends in `text`
}

const NUM_SHARDS: usize = 64; // the shared counts, each shard under its own lock
const MAX_LOCAL_WORDS: usize = 1 << 16; // a worker hands its own counts over at this size: memory stays flat
const CACHE_BITS: u32 = 14; // frequent short words are counted in 2^14 slots of 32 bytes, mostly in the L2 cache

struct Counter<'a> {
    cache: Vec<(u128, u64)>, // (short key, count); a word that meets another in its slot evicts it to `local`
    local: WordCounts,
    shards: &'a [Mutex<WordCounts>],
}

impl<'a> Counter<'a> {
    fn new(shards: &'a [Mutex<WordCounts>]) -> Self {
        Counter { cache: vec![(0, 0); 1 << CACHE_BITS], local: WordCounts::default(), shards }
    }

    fn count_batch(&mut self, splitter: &Splitter, batch: &Batch) -> Result<(), String> {
        let mut start = 0;
        for &end in &batch.ends {
            let text = &batch.text[start..end];
            splitter.for_each(text, |start, end| self.count(text.as_bytes(), start, end))?;
            start = end;
        }
        Ok(())
    }

    #[inline(always)]
    fn count(&mut self, text: &[u8], start: usize, end: usize) {
        let Some(key) = short_key(text, start, end) else {
            return self.add_local(&text[start..end], 1);
        };
        let slot = &mut self.cache[(mix(key) >> (64 - CACHE_BITS)) as usize];
        if slot.0 == key {
            slot.1 += 1;
        } else {
            let (old_key, old_count) = std::mem::replace(slot, (key, 1));
            self.evict(old_key, old_count);
        }
    }

    fn evict(&mut self, key: u128, count: u64) {
        if count > 0 {
            self.add_local(&key.to_le_bytes()[..(key >> 120) as usize], count);
        }
    }

    fn add_local(&mut self, word: &[u8], count: u64) {
        self.local.add(word, count);
        if self.local.counts.len() >= MAX_LOCAL_WORDS {
            self.share();
        }
    }

    fn share(&mut self) {
        for (id, &count) in self.local.counts.iter().enumerate() {
            let word = self.local.words.get(id as u32);
            let shard = &self.shards[(hash(word) >> 20) as usize % NUM_SHARDS];
            locked(shard).add(word, count);
        }
        self.local.words.clear();
        self.local.counts.clear();
    }

    fn finish(mut self) {
        for (key, count) in std::mem::take(&mut self.cache) {
            self.evict(key, count);
        }
        self.share();
    }
}

/// Counts the words of all batches. `next_batch` runs on the calling thread, while the workers split and count; it
/// fills the batch it is given and returns false at the end of the stream.
pub fn count_words<E: From<String>>(
    splitter: &Splitter,
    num_threads: usize,
    mut next_batch: impl FnMut(&mut Batch) -> Result<bool, E>,
) -> Result<Vec<WordCounts>, E> {
    let shards: Vec<Mutex<WordCounts>> = (0..NUM_SHARDS).map(|_| Mutex::default()).collect();
    let error = OnceLock::new(); // the first text that the pattern failed on
    let (sender, receiver) = mpsc::sync_channel::<Batch>(num_threads);
    let receiver = Mutex::new(receiver);
    let receive = || locked(&receiver).recv(); // an error once the sender is gone
    let work = || {
        let mut counter = Counter::new(&shards);
        while let Ok(batch) = receive() {
            if let Err(message) = counter.count_batch(splitter, &batch) {
                let _ = error.set(message);
            }
        }
        counter.finish();
    };
    std::thread::scope(|scope| -> Result<(), E> {
        let sender = sender; // dropped on the way out, also by an error, which ends the workers
        for _ in 0..num_threads {
            scope.spawn(work);
        }
        let mut batch = Batch::default();
        while error.get().is_none() && next_batch(&mut batch)? {
            let _ = sender.send(std::mem::take(&mut batch));
        }
        Ok(())
    })?;
    match error.into_inner() {
        Some(message) => Err(E::from(message)),
        None => Ok(shards.into_iter().map(|shard| shard.into_inner().unwrap_or_else(|e| e.into_inner())).collect()),
    }
}

/// A lock stays usable after a panic in another thread: that panic is reported on its own.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
