#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| berth_fuzz::vhost_user::replies(data));
