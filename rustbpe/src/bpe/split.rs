//! Cuts text into pieces ("words"); BPE never merges across a cut.
//!
//! Three patterns are split by hand, about ten times as fast as by a regex engine. They differ only in how many digits
//! make a piece. Character classes come from the tables of `regex-syntax`, the ones the regex engine uses, so the two
//! cannot drift apart.

use super::Error;
use regex_syntax::hir::{Class, HirKind};
use std::sync::LazyLock;

/// GPT-4's split, but with at most two digits in a number: small vocabularies have no room for every 3-digit number.
pub const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
);

/// GPT-4's own split, in the spelling of transformers.
pub const GPT4_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The same with each digit alone, as Qwen2 spells it.
pub const QWEN_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The patterns that are split by hand, and the most digits in a piece of each.
pub const FAST_PATTERNS: [(&str, usize); 3] = [(DEFAULT_PATTERN, 2), (GPT4_PATTERN, 3), (QWEN_PATTERN, 1)];

pub enum Splitter {
    ByHand { max_digits: usize },
    Regex(Box<fancy_regex::Regex>),
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, Error> {
        if let Some((_, max_digits)) = FAST_PATTERNS.into_iter().find(|(fast, _)| *fast == pattern) {
            return Ok(Splitter::ByHand { max_digits });
        }
        let regex = fancy_regex::Regex::new(pattern).map_err(|e| format!("bad split pattern {pattern:?}: {e}"))?;
        Ok(Splitter::Regex(Box::new(regex)))
    }

    /// Calls `f(start, end)` for each piece, in order. Text that a pattern leaves unmatched is dropped, as in tiktoken.
    pub fn for_each(&self, text: &str, mut f: impl FnMut(usize, usize)) -> Result<(), Error> {
        match self {
            Splitter::ByHand { max_digits } => {
                let scan = Scan { text, bytes: text.as_bytes(), max_digits: *max_digits };
                let mut start = 0;
                while start < text.len() {
                    let end = scan.piece_end(start);
                    f(start, end);
                    start = end;
                }
            }
            Splitter::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|e| format!("split pattern failed on a text: {e}"))?;
                    if found.start() < found.end() {
                        f(found.start(), found.end());
                    }
                }
            }
        }
        Ok(())
    }
}

// -----------------------------------------------------------------------------
// Character classes

const OTHER: u8 = 0;
const LETTER: u8 = 1; // \p{L}
const NUMBER: u8 = 2; // \p{N}
const SPACE: u8 = 3; // \s without the next two
const NEWLINE: u8 = 4; // \r and \n

const WIDE: u8 = 5; // in BYTE_CLASSES: the character has several bytes

/// The class of each one-byte character, in a table small enough for the L1 cache.
static BYTE_CLASSES: [u8; 256] = {
    let mut classes = [WIDE; 256];
    let mut byte = 0;
    while byte < 0x80 {
        classes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            b'0'..=b'9' => NUMBER,
            b'\r' | b'\n' => NEWLINE,
            b' ' | b'\t' | 0x0B | 0x0C => SPACE,
            _ => OTHER,
        };
        byte += 1;
    }
    classes
};

/// One byte per code point, 1.1 MB; only the few pages of the scripts in use are ever touched.
static CLASSES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut classes = vec![OTHER; char::MAX as usize + 1];
    for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"[\r\n]", NEWLINE)] {
        for (first, last) in code_points(pattern) {
            classes[first as usize..=last as usize].fill(class);
        }
    }
    classes
});

/// The ranges of code points that a one-character pattern matches.
fn code_points(pattern: &str) -> Vec<(char, char)> {
    match regex_syntax::parse(pattern).map(|hir| hir.into_kind()) {
        Ok(HirKind::Class(Class::Unicode(class))) => class.ranges().iter().map(|r| (r.start(), r.end())).collect(),
        other => unreachable!("{pattern} is a class of characters, not {other:?}"),
    }
}

// -----------------------------------------------------------------------------
// The fast patterns by hand

/// How many of sixteen bytes, from the lowest on, are ASCII letters. A byte plus 0x80 - x has its top bit set if the byte
/// is x or more; none carries into the next one.
#[inline(always)]
fn leading_ascii_letters(bytes: u128) -> usize {
    const EACH: u128 = u128::MAX / 0xFF;
    let lower = (bytes | (0x20 * EACH)) & (0x7F * EACH);
    let from_a = lower + (0x80 - b'a') as u128 * EACH;
    let beyond_z = lower + (0x80 - b'z' - 1) as u128 * EACH;
    let others = !(from_a & !beyond_z & !bytes) & (0x80 * EACH);
    others.trailing_zeros() as usize / 8
}

struct Scan<'a> {
    text: &'a str,
    bytes: &'a [u8],
    max_digits: usize, // in a piece
}

impl Scan<'_> {
    /// (class, length in bytes) of the character at `i`; at the end of the text (OTHER, 0).
    #[inline(always)]
    fn class(&self, i: usize) -> (u8, usize) {
        match self.bytes.get(i).map(|&byte| BYTE_CLASSES[byte as usize]) {
            Some(WIDE) => self.wide_class(i),
            Some(class) => (class, 1),
            None => (OTHER, 0),
        }
    }

    fn wide_class(&self, i: usize) -> (u8, usize) {
        self.text[i..].chars().next().map_or((OTHER, 0), |c| (CLASSES[c as usize], c.len_utf8()))
    }

    /// Where the run of letters that starts at `i` ends. Sixteen bytes at a time: where words end can't be predicted, and
    /// a loop over their bytes would guess wrong at nearly each of them.
    #[inline(always)]
    fn letters_end(&self, mut i: usize) -> usize {
        while let Some(Ok(window)) = self.bytes.get(i..i + 16).map(TryInto::try_into) {
            let len = leading_ascii_letters(u128::from_le_bytes(window));
            i += len;
            if len < 16 {
                return if self.bytes[i] < 0x80 { i } else { self.run_end(i, LETTER) };
            }
        }
        self.run_end(i, LETTER)
    }

    /// Where the run of characters of `class` that starts at `i` ends.
    #[inline(always)]
    fn run_end(&self, mut i: usize, class: u8) -> usize {
        loop {
            let found = self.bytes[i..].iter().position(|&byte| BYTE_CLASSES[byte as usize] != class);
            let Some(len) = found else { return self.bytes.len() };
            i += len;
            match self.class(i) {
                (found, len) if found == class => i += len,
                _ => return i,
            }
        }
    }

    /// The end of the piece that starts at `start`, which lies inside the text. The alternatives of the pattern in
    /// order of their first character; each branch names the one it stands for.
    #[inline(always)]
    fn piece_end(&self, start: usize) -> usize {
        let (class, len) = self.class(start);
        let next = start + len;
        match class {
            LETTER => return self.letters_end(next), // \p{L}+
            NUMBER => return self.digits_end(next),  // \p{N}{1,max_digits}
            NEWLINE => return self.space_end(start),
            _ => {}
        }
        if self.bytes[start] == b'\'' {
            if let Some(end) = self.contraction_end(next) {
                return end; // '(?i:[sdmt]|ll|ve|re)
            }
        }
        let (next_class, next_len) = self.class(next);
        if next_class == LETTER {
            self.letters_end(next) // [^\r\n\p{L}\p{N}]\p{L}+
        } else if class == OTHER || (self.bytes[start] == b' ' && next_class == OTHER && next_len > 0) {
            self.run_end(self.run_end(next, OTHER), NEWLINE) //  ?[^\s\p{L}\p{N}]++[\r\n]*
        } else {
            self.space_end(start)
        }
    }

    /// Where the number ends whose first digit lies before `i`.
    #[inline(always)]
    fn digits_end(&self, mut i: usize) -> usize {
        for _ in 1..self.max_digits {
            match self.class(i) {
                (NUMBER, len) => i += len,
                _ => break,
            }
        }
        i
    }

    fn contraction_end(&self, i: usize) -> Option<usize> {
        let [first, second] = [0, 1].map(|k| self.bytes.get(i + k).map_or(0, u8::to_ascii_lowercase));
        match (first, second) {
            (b's' | b'd' | b'm' | b't', _) => Some(i + 1),
            (b'l', b'l') | (b'v' | b'r', b'e') => Some(i + 2),
            (0xC5, 0xBF) => Some(i + 2), // U+017F, the long s: an s without case
            _ => None,
        }
    }

    /// \s*[\r\n] | \s+(?!\S) | \s+ : up to the last newline of the run; without one, all but the last character,
    /// which goes with the word that follows; all of it at the end of the text or when it is a single character.
    fn space_end(&self, start: usize) -> usize {
        let mut i = start;
        let mut last = start; // where the last character of the run begins
        let mut after_newline = None;
        loop {
            let (class, len) = self.class(i);
            if (class != SPACE && class != NEWLINE) || len == 0 {
                break;
            }
            last = i;
            i += len;
            if class == NEWLINE {
                after_newline = Some(i);
            }
        }
        match after_newline {
            Some(end) => end,
            None if i < self.bytes.len() && last > start => last,
            None => i,
        }
    }
}
