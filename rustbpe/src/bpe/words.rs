//! Words by number, and how often each occurs.

use super::split::Splitter;
use super::Error;
use hashbrown::HashTable;
use rustc_hash::FxHasher;
use std::hash::Hasher;
use std::sync::{mpsc, Mutex, MutexGuard, OnceLock};

/// A word as one number, so that most comparisons are a single step. Up to 15 bytes: the bytes themselves, and their
/// number in the top byte. Longer words: a hash, marked by LONG in the top byte. Never 0. The key of a piece of a text
/// is read faster (16 bytes at once) from the text than from a slice of it.
pub type Key = u128;

const LONG: u128 = 0xFF;

#[inline(always)]
pub fn key_of(text: &[u8], start: usize, end: usize) -> Key {
    let len = end - start;
    let (tag, low) = if len > 15 {
        let mut hasher = FxHasher::default();
        hasher.write(&text[start..end]);
        (LONG, hasher.finish() as u128)
    } else if let Some(Ok(window)) = text.get(start..start + 16).map(TryInto::try_into) {
        (len as u128, u128::from_le_bytes(window) & ((1 << (8 * len)) - 1))
    } else {
        let bytes = text[start..end].iter().rev(); // near the end of the text
        (len as u128, bytes.fold(0, |key, &byte| key << 8 | byte as u128))
    };
    tag << 120 | low
}

#[inline(always)]
pub fn is_short(key: Key) -> bool {
    key >> 120 != LONG
}

/// 64 well-mixed bits of a key.
#[inline(always)]
pub fn hash(key: Key) -> u64 {
    let product = (key as u64 ^ 0x9E37_79B9_7F4A_7C15) as u128 * ((key >> 64) as u64 ^ 0xC2B2_AE3D_27D4_EB4F) as u128;
    (product as u64 ^ (product >> 64) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Byte strings numbered in order of arrival, without an allocation per string.
#[derive(Default)]
pub struct Interner {
    bytes: Vec<u8>,               // all strings, one after another
    ends: Vec<usize>,             // where each ends in `bytes`
    table: HashTable<(Key, u32)>, // key and number of each
}

impl Interner {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..self.ends[id]]
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len() as u32).map(|id| self.get(id))
    }

    /// The number of the string `text[start..end]`.
    #[inline]
    pub fn find(&self, key: Key, text: &[u8], start: usize, end: usize) -> Option<u32> {
        let is_equal = |entry: &(Key, u32)| entry.0 == key && (is_short(key) || self.get(entry.1) == &text[start..end]);
        self.table.find(hash(key), is_equal).map(|entry| entry.1)
    }

    /// The same for a string on its own; a new number if it was not known.
    pub fn insert(&mut self, key: Key, word: &[u8]) -> u32 {
        if let Some(id) = self.find(key, word, 0, word.len()) {
            return id;
        }
        let id = self.ends.len() as u32;
        self.table.insert_unique(hash(key), (key, id), |entry| hash(entry.0));
        self.bytes.extend_from_slice(word);
        self.ends.push(self.bytes.len());
        id
    }

    pub fn insert_bytes(&mut self, word: &[u8]) -> u32 {
        self.insert(key_of(word, 0, word.len()), word)
    }

    pub fn find_bytes(&self, word: &[u8]) -> Option<u32> {
        self.find(key_of(word, 0, word.len()), word, 0, word.len())
    }
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
    fn add(&mut self, key: Key, word: &[u8], count: u64) {
        let id = self.words.insert(key, word) as usize;
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

const NUM_SHARDS: usize = 64; // the counts that workers share, each shard under its own lock
const CACHE_BITS: u32 = 14; // a worker counts short words in 2^14 slots of 32 bytes, mostly in its L2 cache

/// A worker's counts of the words it met last: (short key, count). A word that meets another in its slot evicts it to
/// the shards.
struct Counter<'a> {
    cache: Vec<(Key, u64)>,
    shards: &'a [Mutex<WordCounts>],
}

impl Counter<'_> {
    fn count_batch(&mut self, splitter: &Splitter, batch: &Batch) -> Result<(), Error> {
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
        let key = key_of(text, start, end);
        if !is_short(key) {
            return self.share(key, &text[start..end], 1);
        }
        let slot = &mut self.cache[(hash(key) >> (64 - CACHE_BITS)) as usize];
        if slot.0 == key {
            slot.1 += 1;
        } else {
            let (old_key, old_count) = std::mem::replace(slot, (key, 1));
            self.evict(old_key, old_count);
        }
    }

    fn evict(&self, key: Key, count: u64) {
        if count > 0 {
            let len = (key >> 120) as usize;
            self.share(key, &key.to_le_bytes()[..len], count);
        }
    }

    fn share(&self, key: Key, word: &[u8], count: u64) {
        locked(&self.shards[hash(key) as usize % NUM_SHARDS]).add(key, word, count);
    }
}

/// Counts the words of all batches. `next_batch` runs on the calling thread, while the workers split and count; it
/// fills the batch it is given and returns false at the end of the stream.
pub fn count_words(
    splitter: &Splitter, num_threads: usize, mut next_batch: impl FnMut(&mut Batch) -> Result<bool, Error>,
) -> Result<Vec<WordCounts>, Error> {
    let shards: Vec<Mutex<WordCounts>> = (0..NUM_SHARDS).map(|_| Mutex::default()).collect();
    let error = OnceLock::new(); // the first text that the pattern failed on
    let (sender, receiver) = mpsc::sync_channel::<Batch>(num_threads);
    let receiver = Mutex::new(receiver);
    let receive = || locked(&receiver).recv(); // an error once the sender is gone
    let work = || {
        let mut counter = Counter { cache: vec![(0, 0); 1 << CACHE_BITS], shards: &shards };
        while let Ok(batch) = receive() {
            if let Err(failure) = counter.count_batch(splitter, &batch) {
                let _ = error.set(failure);
            }
        }
        counter.cache.iter().for_each(|&(key, count)| counter.evict(key, count));
    };
    std::thread::scope(|scope| -> Result<(), Error> {
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
        Some(error) => Err(error),
        None => Ok(shards.iter().map(|shard| std::mem::take(&mut *locked(shard))).collect()),
    }
}

/// A lock stays usable after a panic in another thread: that panic is reported on its own.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
