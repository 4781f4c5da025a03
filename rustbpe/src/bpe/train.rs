//! Learns merges from word counts.
//!
//! All words lie in one array, a cell per byte, and tokens are merged in place. Tokens only ever grow, so after the
//! merge that creates a pair its count can only fall. A heap therefore holds each pair once with an upper bound of its
//! count: the top is recounted, and merged if the bound was exact, or else put back with the new count. Merging costs
//! time in proportion to the places where something is merged, and there is no table of pairs to keep up to date.

use super::words::{Interner, WordCounts};
use super::Error;
use std::cmp::Reverse;
use std::collections::binary_heap::{BinaryHeap, PeekMut};

type Pair = (u32, u32);

const EDGE: u32 = u32::MAX; // the cell before and after each word
const INSIDE: u32 = u32::MAX - 1; // a cell within a token; only its first and last cell hold the token
const CHECK_EVERY: usize = 256; // merges between two calls of `check`, a fraction of a second

#[derive(Clone, Copy)]
struct Cell {
    token: u32,
    word: u32, // index into `counts`
}

/// A pair on the heap. The order decides what is merged: the highest count, among equals the smallest pair of ids.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    count: u64, // upper bound, in occurrences over the whole corpus
    pair: Reverse<Pair>,
    start: usize, // its places, ascending: `places[start..start + len]`; some no longer hold the pair
    len: usize,
}

#[derive(Default)]
struct Group {
    key: u32,
    count: u64,
    start: usize,
    len: usize,
}

struct Trainer {
    cells: Vec<Cell>,
    counts: Vec<u64>, // of the words
    lens: Vec<u32>,   // bytes of each token
    places: Vec<u32>, // cells where a pair starts, the list of one pair after that of another
    heap: BinaryHeap<Candidate>,
    group_of: Vec<u32>, // scratch of `add_pairs`: index into `groups`, or EDGE
    groups: Vec<Group>,
}

/// The tokens: first the 256 bytes, then one a merge, until the vocabulary is full or no pair is left.
/// `check` is called now and then; its error stops the training.
pub fn learn_tokens(
    corpus: Vec<WordCounts>, vocab_size: usize, mut check: impl FnMut() -> Result<(), Error>,
) -> Result<Interner, Error> {
    let mut trainer = Trainer::new(corpus)?;
    let mut tokens = Interner::default();
    for byte in 0..=255 {
        tokens.insert_bytes(&[byte]);
    }
    while tokens.len() < vocab_size {
        if tokens.len() % CHECK_EVERY == 0 {
            check()?;
        }
        let Some(best) = trainer.pop_best() else { break };
        let Reverse((left, right)) = best.pair;
        let token = [tokens.get(left), tokens.get(right)].concat();
        // A second pair that spells a token we have is passed over: a table of ranks has one id for each byte string.
        if tokens.find_bytes(&token).is_none() {
            trainer.merge(&best);
            tokens.insert_bytes(&token);
        }
    }
    Ok(tokens)
}

impl Trainer {
    fn new(corpus: Vec<WordCounts>) -> Result<Self, Error> {
        let edge = Cell { token: EDGE, word: 0 };
        let mut cells = vec![edge];
        let mut counts = Vec::new();
        for shard in corpus {
            for (word, &count) in shard.words.iter().zip(&shard.counts) {
                if word.len() > 1 {
                    cells.extend(word.iter().map(|&byte| Cell { token: byte as u32, word: counts.len() as u32 }));
                    cells.push(edge);
                    counts.push(count);
                }
            }
        }
        if cells.len() > INSIDE as usize {
            return Err(
                format!("the distinct words have {} bytes, more than 4 GB: train on less text", cells.len()).into()
            );
        }
        let mut trainer = Trainer {
            cells,
            counts,
            lens: vec![1; 256],
            places: Vec::new(),
            heap: BinaryHeap::new(),
            group_of: vec![EDGE; 1 << 16],
            groups: Vec::new(),
        };
        let pairs = trainer.cells.windows(2).enumerate().filter(|(_, w)| w[0].token != EDGE && w[1].token != EDGE);
        let places: Vec<(u32, u32)> = pairs.map(|(i, w)| (w[0].token << 8 | w[1].token, i as u32)).collect();
        trainer.add_pairs(&places, |key| (key >> 8, key & 255));
        Ok(trainer)
    }

    /// Puts new pairs on the heap. `found` holds (key of the pair, cell where it starts), the cells ascending.
    fn add_pairs(&mut self, found: &[(u32, u32)], pair_of: impl Fn(u32) -> Pair) {
        self.groups.clear();
        for &(key, place) in found {
            let group = &mut self.group_of[key as usize];
            if *group == EDGE {
                *group = self.groups.len() as u32;
                self.groups.push(Group { key, ..Group::default() });
            }
            let group = &mut self.groups[*group as usize];
            group.count += self.counts[self.cells[place as usize].word as usize];
            group.len += 1;
        }
        let mut start = self.places.len();
        self.places.resize(start + found.len(), 0);
        for group in &mut self.groups {
            group.start = start;
            start += std::mem::take(&mut group.len); // counted up again below
        }
        for &(key, place) in found {
            let group = &mut self.groups[self.group_of[key as usize] as usize];
            self.places[group.start + group.len] = place;
            group.len += 1;
        }
        for &Group { key, count, start, len } in &self.groups {
            self.group_of[key as usize] = EDGE;
            self.heap.push(Candidate { count, pair: Reverse(pair_of(key)), start, len });
        }
    }

    fn holds_pair(&self, place: u32, (left, right): Pair) -> bool {
        let place = place as usize;
        self.cells[place].token == left && self.cells[place + self.lens[left as usize] as usize].token == right
    }

    /// Takes the pair with the highest exact count off the heap.
    fn pop_best(&mut self) -> Option<Candidate> {
        let mut heap = std::mem::take(&mut self.heap);
        let best = loop {
            let Some(mut top) = heap.peek_mut() else { break None };
            let bound = top.count;
            self.recount(&mut top);
            if top.count == bound {
                break Some(PeekMut::pop(top));
            } else if top.count == 0 {
                PeekMut::pop(top);
            } // else the heap moves it to its new place when `top` is dropped
        };
        self.heap = heap;
        best
    }

    /// Makes the count exact and drops places that no longer hold the pair.
    fn recount(&mut self, candidate: &mut Candidate) {
        let mut count = 0;
        let mut len = 0;
        for i in candidate.start..candidate.start + candidate.len {
            let place = self.places[i];
            if self.holds_pair(place, candidate.pair.0) {
                count += self.counts[self.cells[place as usize].word as usize];
                self.places[candidate.start + len] = place;
                len += 1;
            }
        }
        candidate.count = count;
        candidate.len = len;
    }

    /// Merges a pair everywhere, from left to right, and puts the pairs that the new token forms on the heap.
    fn merge(&mut self, best: &Candidate) {
        let (left, right) = best.pair.0;
        let [left_len, right_len] = [left, right].map(|token| self.lens[token as usize] as usize);
        let token = self.lens.len() as u32; // the new one
        let len = left_len + right_len;
        self.lens.push(len as u32);
        self.group_of.resize(self.group_of.len().max(self.lens.len()), EDGE);
        let mut merged = Vec::with_capacity(best.len);
        for i in best.start..best.start + best.len {
            let place = self.places[i];
            if !self.holds_pair(place, best.pair.0) {
                continue; // in `aaa` the second place of `aa` is gone once the first is merged
            }
            let cells = &mut self.cells[place as usize..place as usize + len];
            // the middle first: in a token of two bytes the ends are the same two cells
            cells[left_len - 1].token = INSIDE;
            cells[left_len].token = INSIDE;
            cells[0].token = token;
            cells[len - 1].token = token;
            merged.push(place);
        }
        let mut before = Vec::new();
        let mut after = Vec::new();
        for &place in &merged {
            let neighbour = self.cells[place as usize - 1].token;
            if neighbour != EDGE {
                before.push((neighbour, place - self.lens[neighbour as usize]));
            }
            let neighbour = self.cells[place as usize + len].token;
            if neighbour != EDGE && neighbour != token {
                after.push((neighbour, place)); // a pair of two new tokens is found once, from its right half
            }
        }
        self.add_pairs(&before, |neighbour| (neighbour, token));
        self.add_pairs(&after, |neighbour| (token, neighbour));
    }
}
