use super::encode::Encoder;
use super::split::{Splitter, DEFAULT_PATTERN, FAST_PATTERNS, GPT4_PATTERN, QWEN_PATTERN};
use super::train::learn_tokens;
use super::words::{count_words, hash, key_of, Batch, Interner};

fn pieces<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
    let mut pieces = Vec::new();
    splitter.for_each(text, |start, end| pieces.push(&text[start..end])).unwrap();
    pieces
}

/// Each pattern that is split by hand, with its splitter and one that goes through the regex engine.
fn by_hand_and_by_regex() -> [(Splitter, Splitter); 3] {
    FAST_PATTERNS.map(|(pattern, _)| {
        let ours = Splitter::new(pattern).unwrap();
        assert!(matches!(ours, Splitter::ByHand { .. }));
        let regex = Splitter::new(&format!("(?:{pattern})")).unwrap();
        assert!(matches!(regex, Splitter::Regex(_)));
        (ours, regex)
    })
}

/// A small random generator (xorshift), so that a failure can be repeated.
fn random(state: &mut u64, below: usize) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 33) as usize % below
}

fn train(texts: &[&str], vocab_size: usize, num_threads: usize, pattern: &str) -> Interner {
    let mut stream = texts.iter();
    let next_batch = |batch: &mut Batch| {
        let text = stream.next();
        batch.text.extend(text.copied());
        batch.ends.push(batch.text.len());
        Ok(text.is_some())
    };
    let words = count_words(&Splitter::new(pattern).unwrap(), num_threads, next_batch).unwrap();
    learn_tokens(words, vocab_size, || Ok(())).unwrap()
}

#[test]
fn the_splitters_equal_the_regex_on_every_code_point() {
    for (ours, regex) in by_hand_and_by_regex() {
        for c in '\0'..=char::MAX {
            let text = format!("a{c}{c}b {c}1{c}'{c}l\n{c}!{c}{c}{c}{c}");
            assert_eq!(pieces(&ours, &text), pieces(&regex, &text), "{c:?}");
        }
    }
}

#[test]
fn the_splitters_equal_the_regex_on_random_text() {
    let alphabet: Vec<char> = "aSsLlTtvVrReEdDmM''ſ123٣½  \t\n\r\u{85}\u{a0}\u{3000}!.é日\u{301}👍".chars().collect();
    for (ours, regex) in by_hand_and_by_regex() {
        let mut state = 1;
        for _ in 0..50_000 {
            let len = random(&mut state, 24);
            let text: String = (0..len).map(|_| alphabet[random(&mut state, alphabet.len())]).collect();
            assert_eq!(pieces(&ours, &text), pieces(&regex, &text), "{text:?}");
        }
    }
}

#[test]
fn pieces_are_those_of_the_pattern_by_hand() {
    let text = "It's  1234567 o'clock!!\n\n  'ſo\u{a0}x\n y ";
    let after = [" o", "'clock", "!!\n\n", " ", " '", "ſo", "\u{a0}x", "\n", " y", " "];
    let numbers: [(&str, &[&str]); 3] = [
        (DEFAULT_PATTERN, &["12", "34", "56", "7"]),
        (GPT4_PATTERN, &["123", "456", "7"]),
        (QWEN_PATTERN, &["1", "2", "3", "4", "5", "6", "7"]),
    ];
    for (pattern, number) in numbers {
        let expected = [&["It", "'s", " ", " "], number, &after].concat();
        assert_eq!(pieces(&Splitter::new(pattern).unwrap(), text), expected);
    }
}

#[test]
fn other_patterns_may_leave_text_out_and_bad_ones_are_errors() {
    assert_eq!(pieces(&Splitter::new(r"\w+").unwrap(), "a b, c"), ["a", "b", "c"]);
    assert!(Splitter::new("(").is_err());
    assert!(Splitter::new(r"(a|b|ab)*(?>c)").unwrap().for_each(&"ab".repeat(50), |_, _| ()).is_err());
}

#[test]
fn keys_do_not_depend_on_what_follows_the_word() {
    let text = b"some words, and one that is longer than fifteen";
    for start in 0..text.len() {
        for end in start + 1..=text.len() {
            assert_eq!(key_of(text, start, end), key_of(&text[start..end], 0, end - start));
        }
    }
    assert_ne!(hash(key_of(b"a", 0, 1)), hash(key_of(b"a\0", 0, 2)));
}

#[test]
fn an_interner_numbers_strings_in_order_of_arrival() {
    let mut words = Interner::default();
    let strings: Vec<String> = (0..5000).map(|i| "xyz".repeat(i % 9) + &i.to_string()).collect();
    for _ in 0..2 {
        let ids: Vec<u32> = strings.iter().map(|s| words.insert_bytes(s.as_bytes())).collect();
        assert_eq!(ids, (0..5000).collect::<Vec<u32>>());
    }
    assert!(words.iter().eq(strings.iter().map(String::as_bytes)));
    assert_eq!(words.find_bytes(b"xyz"), None);
}

#[test]
fn training_merges_the_most_frequent_pair_and_breaks_ties_by_id() {
    // Pairs: (a,b) 5, (b,c) 6, so bc; then (a,b) 3, (a,bc) 2; zy and ba tie at 1 and go by their ids.
    let tokens = train(&["ab ab ab abc abc bc bc bc bc", "zy ba"], 999, 2, "[a-z]+");
    let expected: [&[u8]; 5] = [b"bc", b"ab", b"abc", b"ba", b"zy"];
    assert!(tokens.iter().skip(256).eq(expected));
}

#[test]
fn overlapping_repeats_are_merged_from_left_to_right() {
    let tokens = train(&["aaaaa"], 999, 1, "a+"); // aa aa a; (256, 97) before (256, 256): aa aaa
    let expected: [&[u8]; 3] = [b"aa", b"aaa", b"aaaaa"];
    assert!(tokens.iter().skip(256).eq(expected));
}

#[test]
fn an_error_of_the_stream_or_the_check_stops_the_training() {
    let fails = |_: &mut Batch| Err("stream".into());
    assert_eq!(count_words(&Splitter::new(DEFAULT_PATTERN).unwrap(), 2, fails).err().unwrap().to_string(), "stream");
    let check = || Err("check".into());
    assert_eq!(learn_tokens(Vec::new(), 300, check).err().unwrap().to_string(), "check");
}

#[test]
fn many_threads_encode_like_one() {
    let texts = ["the theme of these theses", "", "then: the 12345 others\n\n"].repeat(30_000);
    let encoder = Encoder::new(Splitter::new(DEFAULT_PATTERN).unwrap(), train(&texts[..100], 300, 1, DEFAULT_PATTERN));
    let one_by_one: Vec<Vec<u32>> = texts.iter().map(|text| encoder.encode(text).unwrap()).collect();
    for num_threads in [1, 2, 5] {
        let parts = encoder.encode_batch(&texts, num_threads).unwrap();
        assert!(parts.len() > 5);
        assert_eq!(parts.into_iter().flat_map(|part| part.split()).collect::<Vec<_>>(), one_by_one);
    }
}
