//! The codec against what anyone may send.

use super::negotiation::{Exports, Negotiation, Next, OPTION_BYTES_MAX};
use super::protocol::{Command, ErrorNumber, REQUEST_BYTES, Step, Terms, decode};
use super::{Device, PAYLOAD_BYTES_MAX, Run};
use proptest::prelude::{any, prop, prop_assert, proptest};
use std::io;
use std::sync::Arc;

struct Nothing;

impl Device for Nothing {
    fn bytes(&self) -> u64 {
        1 << 30
    }

    fn read_at(&self, _offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        Ok(())
    }

    fn extents(&self, _offset: u64, bytes: u64, _limit: usize) -> io::Result<Vec<Run>> {
        Ok(vec![Run { bytes, hole: true }])
    }
}

struct One;

impl Exports for One {
    fn names(&self) -> Vec<String> {
        vec!["one".into()]
    }

    fn find(&self, name: &str) -> Option<(String, Arc<dyn Device>)> {
        matches!(name, "" | "one").then(|| ("one".into(), Arc::new(Nothing) as Arc<dyn Device>))
    }
}

fn terms(read_only: bool, structured: bool) -> Terms {
    Terms { bytes: 1 << 30, read_only, structured, allocation: structured }
}

fn request(flags: u16, kind: u16, offset: u64, bytes: u32) -> Vec<u8> {
    let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
    request.extend(flags.to_be_bytes());
    request.extend(kind.to_be_bytes());
    request.extend(0x1234u64.to_be_bytes());
    request.extend(offset.to_be_bytes());
    request.extend(bytes.to_be_bytes());
    request
}

proptest! {
    #[test]
    fn random_bytes_are_a_request_or_refused(
        noise in prop::collection::vec(any::<u8>(), 0..64),
        read_only in any::<bool>(),
        structured in any::<bool>(),
    ) {
        if noise.len() < REQUEST_BYTES {
            prop_assert!(decode(&noise, &terms(read_only, structured)) == Ok(Step::More(REQUEST_BYTES)));
        } else {
            let magic = noise[..4] == 0x2560_9513u32.to_be_bytes();
            prop_assert!(decode(&noise, &terms(read_only, structured)).is_ok() == magic);
        }
    }

    #[test]
    fn what_passes_lies_within_the_export_and_the_limits(
        flags in prop::num::u16::ANY,
        kind in 0u16..10,
        offset in prop::sample::select(vec![0, 1, 4096, (1 << 30) - 4096, 1 << 30, 1 << 33, u64::MAX]),
        bytes in prop::sample::select(vec![0, 1, 512, 4096, PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX + 1, u32::MAX]),
        read_only in any::<bool>(),
        structured in any::<bool>(),
    ) {
        // Half of the time with flags that mean something.
        for flags in [flags, flags & 0x1f, flags & 1] {
            let found = decode(&request(flags, kind, offset, bytes), &terms(read_only, structured));
            let Step::Request(request) = found.unwrap() else { continue };
            prop_assert!(request.cookie == 0x1234);
            match request.command {
                Command::Disconnect => continue,
                Command::Read { .. } | Command::Write => prop_assert!(bytes <= PAYLOAD_BYTES_MAX),
                Command::BlockStatus { .. } => prop_assert!(structured && bytes > 0),
                _ => {}
            }
            let writes = matches!(kind, 1 | 4 | 6);
            prop_assert!(!(writes && read_only));
            prop_assert!(offset.checked_add(u64::from(bytes)).is_some_and(|end| end <= 1 << 30));
        }
    }

    #[test]
    fn random_options_are_answered(
        options in prop::collection::vec((0u32..14, prop::collection::vec(any::<u8>(), 0..80)), 1..8),
        tls in any::<bool>(),
    ) {
        let mut negotiation = Negotiation::new(tls);
        for (option, data) in options {
            let mut out = Vec::new();
            let next = negotiation.option(option, &data, &One, &mut out);
            prop_assert!(out.len() <= 4096 + OPTION_BYTES_MAX as usize);
            match next {
                Next::Transmit(_) => prop_assert!(!tls, "without TLS"),
                Next::Option | Next::StartTls => prop_assert!(!out.is_empty()),
                Next::End => {}
            }
        }
    }

    #[test]
    fn lengths_that_lie_take_no_memory(count in any::<u32>(), length in any::<u32>(), set in any::<bool>()) {
        let mut negotiation = Negotiation::new(false);
        negotiation.option(8, &[], &One, &mut Vec::new());
        let mut data = 3u32.to_be_bytes().to_vec();
        data.extend(b"one");
        data.extend(count.to_be_bytes());
        data.extend(length.to_be_bytes());
        data.extend(b"base:allocation");
        let mut out = Vec::new();
        negotiation.option(if set { 10 } else { 9 }, &data, &One, &mut out);
        let good = (count, length) == (1, 15);
        prop_assert!(good || out[12..16] == [0x80, 0, 0, 3], "{out:?}");
    }
}

#[test]
fn each_refusal_has_its_number() {
    let refused = |step: Result<Step, _>| match step.unwrap() {
        Step::Refused { error, payload_bytes, .. } => (error, payload_bytes),
        other => panic!("{other:?}"),
    };
    let writable = terms(false, true);
    let judge = |flags, kind, offset, bytes| {
        refused(decode(&request(flags, kind, offset, bytes), &writable))
    };
    assert_eq!(judge(0, 0, 1 << 30, 1), (ErrorNumber::Invalid, 0));
    assert_eq!(judge(0, 1, 1 << 30, 1), (ErrorNumber::NoSpace, 1));
    assert_eq!(judge(0, 6, u64::MAX, 1), (ErrorNumber::NoSpace, 0));
    assert_eq!(judge(0, 0, 0, PAYLOAD_BYTES_MAX + 1), (ErrorNumber::Overflow, 0));
    let large = PAYLOAD_BYTES_MAX + 1;
    assert_eq!(judge(0, 1, 0, large), (ErrorNumber::Overflow, large));
    assert_eq!(judge(1 << 4, 1, 0, 512), (ErrorNumber::Invalid, 512));
    assert_eq!(judge(0, 9, 0, 512), (ErrorNumber::Invalid, 0));
    let step = decode(&request(0, 1, 0, 512), &terms(true, true));
    assert_eq!(refused(step), (ErrorNumber::NotPermitted, 512));
    assert!(matches!(decode(&request(1, 3, 0, 0), &terms(true, true)), Ok(Step::Request(_))));
}

#[test]
fn before_tls_nothing_is_told() {
    let mut negotiation = Negotiation::new(true);
    for option in [3, 6, 7, 8, 9, 10, 99] {
        let mut out = Vec::new();
        assert!(matches!(negotiation.option(option, &[], &One, &mut out), Next::Option));
        assert_eq!(out[12..16], [0x80, 0, 0, 5], "option {option}");
        assert!(!out.windows(3).any(|part| part == b"one"));
    }
    assert!(matches!(negotiation.option(1, b"one", &One, &mut Vec::new()), Next::End));
    assert!(matches!(negotiation.option(5, &[], &One, &mut Vec::new()), Next::StartTls));
    negotiation.secured();
    let mut out = Vec::new();
    negotiation.option(3, &[], &One, &mut out);
    assert!(out.windows(3).any(|part| part == b"one"));
}
