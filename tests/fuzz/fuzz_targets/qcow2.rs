#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| berth_fuzz::qcow2::qcow2(data));
