#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| secondsite_tests::decoders::run("header", bytes));
