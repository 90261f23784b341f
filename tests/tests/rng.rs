//! The guest gets random bytes from the host.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use api_socket::{EntropyUpdate, RateLimiter, Request, TokenBucket};
use berth_tests::guest::{Guest, Name, Setup};

#[test]
fn random_bytes_come_from_the_host_and_never_twice() {
    let mut guest = Guest::booted(Setup { entropy: true, ..Setup::default() });
    assert_eq!(guest.run("cat /sys/class/misc/hw_random/rng_current"), "virtio_rng.0\n");
    let draw = "dd if=/dev/hwrng bs=64 count=64 iflag=fullblock 2> /dev/null | tee /run/drawn | md5sum";
    let first = guest.run(draw);
    assert_eq!(guest.number("wc -c < /run/drawn"), 4096);
    assert_ne!(guest.run(draw), first);
    // Random bytes cannot be packed.
    assert!(guest.number("gzip < /run/drawn | wc -c") > 4096);
    guest.power_off();
}

#[test]
fn limits_change_while_the_guest_draws() {
    limits_change(Name::Berth);
}

#[test]
fn limits_change_while_the_guest_draws_without_pci() {
    limits_change(Name::Firecracker);
}

fn limits_change(name: Name) {
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let mut guest = Guest::booted(Setup { name, entropy: true, arguments, ..Setup::default() });
    let limit = |guest: &mut Guest, size| {
        let bandwidth = Some(TokenBucket { size, one_time_burst: None, refill_time: 1000 });
        let rate_limiter = Some(RateLimiter { bandwidth, ops: None });
        guest.apply(Request::PatchEntropy(EntropyUpdate { rate_limiter }));
        assert_eq!(guest.api.vm_config().unwrap().entropy.unwrap().rate_limiter, rate_limiter);
    };
    let draw = "dd if=/dev/hwrng bs=64 count=64 iflag=fullblock of=/dev/null 2> /dev/null";
    guest.run(draw);
    assert_eq!(guest.metric("entropy", "entropy_rate_limiter_throttled"), 0);
    limit(&mut guest, 1024);
    guest.run(draw);
    assert!(guest.metric("entropy", "entropy_rate_limiter_throttled") > 0);
    // One that would wait for ever is let go when the limit is.
    limit(&mut guest, 1);
    guest.run(&format!("({draw}; touch /run/drawn) &"));
    assert_ne!(guest.shell("sleep 3; [ -e /run/drawn ]").code, 0);
    limit(&mut guest, 0);
    guest.run("until [ -e /run/drawn ]; do sleep 0.1; done");
    guest.power_off();
}

#[test]
fn a_guest_without_an_entropy_device_has_no_limits_to_change() {
    let mut guest = Guest::booted(Setup::default());
    let change = Request::PatchEntropy(EntropyUpdate { rate_limiter: Some(RateLimiter::default()) });
    let error = guest.api.apply(&change).unwrap_err().to_string();
    assert!(error.contains("PUT /entropy"), "{error}");
    guest.power_off();
}
