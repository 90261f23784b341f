//! Disks that are qcow2 images: what they do otherwise than raw ones.

use super::*;
use crate::backend::qcow2::testing::Blank;

fn blank(cluster_bits: u32, size: u64) -> Rig {
    let image = tempfile::tempfile().unwrap();
    image.write_all_at(&Blank { cluster_bits, size, backing: None }.bytes(), 0).unwrap();
    rig_with(|config| (config.file, config.format) = (image, Format::Qcow2(Vec::new())))
}

#[test]
fn what_is_not_in_the_tables_of_an_image_has_failed() {
    let mut rig = blank(16, 1 << 20);
    let (sector, room) = (rig.driver.data(&[7; 512]), rig.driver.room(512));
    let zeroes = rig.driver.data(&range(8, 8, 0));
    let changes = [(spec::VIRTIO_BLK_T_OUT, sector), (spec::VIRTIO_BLK_T_WRITE_ZEROES, zeroes)];
    for (is_full, status) in [(false, OK), (true, IOERR), (false, OK)] {
        rig.slot.device.worker.disk.pretend_full(is_full);
        for (kind, data) in changes {
            assert_eq!(rig.request(kind, 3, &[data]).0, status);
        }
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_IN, 3, &[room]), (OK, 513), "it reads on");
        assert_eq!(rig.driver.read(room), [7; 512]);
    }
    assert_eq!(rig.counter(|c| &c.write_count), 2);
    assert_eq!(rig.counter(|c| &c.write_zeroes_count), 2);
    assert_eq!(rig.counter(|c| &c.execute_fails), 2);
}

#[test]
fn tables_that_cannot_be_written_are_told_once_and_then_by_the_number_of_requests() {
    let mut rig = blank(16, 1 << 20);
    rig.slot.device.worker.disk.pretend_full(true);
    let sector = rig.driver.data(&[7; 512]);
    for _ in 0..30 {
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_OUT, 0, &[sector]), IOERR);
    }
    // The first was told at once.
    let told = rig.slot.device.worker.troubles.clear();
    assert_eq!(told.len(), 1);
    let text =
        "29 more: writing: the image's tables cannot be written: No space left on device (os error 28)";
    assert_eq!(told[0], text);
}

#[test]
fn what_changes_an_image_comes_back_with_one_call_to_the_driver_for_all_of_a_turn() {
    let mut rig = blank(16, 1 << 20);
    rig.slot.run(10);
    rig.slot.calls.take_queue();
    let sector = rig.driver.data(&[7; 512]);
    for at in 0..8 {
        rig.submit(spec::VIRTIO_BLK_T_OUT, at, &[sector]);
    }
    rig.slot.device.handle(0);
    assert_eq!(rig.driver.reap_all().len(), 8);
    assert_eq!(rig.slot.calls.take_queue(), 1);
}

#[test]
fn a_discard_and_zeroes_are_for_a_limited_number_of_clusters() {
    for (cluster_bits, discard, zeroes) in
        [(9, 1 << 10, 1 << 10), (16, 1 << 17, 1 << 17), (21, 1 << 21, 1 << 17)]
    {
        let mut rig = blank(cluster_bits, 1 << (cluster_bits + 17).min(32));
        let told = |offset| {
            let mut field = [0; 4];
            rig.slot.device.config(offset, &mut field);
            u32::from_le_bytes(field)
        };
        assert_eq!([told(36), told(40), told(48)], [discard, 1, zeroes], "{cluster_bits}");
        for (kind, most) in [(spec::VIRTIO_BLK_T_DISCARD, discard), (spec::VIRTIO_BLK_T_WRITE_ZEROES, zeroes)]
        {
            assert_eq!(rig.ranges(kind, &[range(0, most, 0)]), OK);
            assert_eq!(rig.ranges(kind, &[range(0, most + 1, 0)]), IOERR);
            assert_eq!(rig.ranges(kind, &[range(0, 8, 0), range(8, 8, 0)]), IOERR);
        }
    }
    let mut raw = [0; 8];
    rig().slot.device.config(36, &mut raw);
    assert_eq!(raw, [0, 0, 0x20, 0, 16, 0, 0, 0], "16 times 1 GiB of a raw disk");
}
