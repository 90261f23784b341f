//! The guest gets random bytes from the host.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use berth_tests::guest::{Guest, Setup};

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
