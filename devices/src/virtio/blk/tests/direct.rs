//! Disks that are open for direct I/O, and such as want larger blocks than the host of these tests may have.

use super::*;
use crate::backend::direct;

const LARGE: Alignment = Alignment { memory: 4096, block: 4096 };

/// A disk of blocks of 4096 bytes, as far as the device knows.
fn large_blocks(engine: Engine) -> Rig {
    let mut rig = rig_with(|config| config.engine = engine);
    rig.slot.device.worker.disk.pretend(LARGE);
    rig
}

fn direct_file(bytes: u64) -> File {
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(bytes).unwrap();
    let file = path.reopen().unwrap();
    direct::enable(&file).unwrap();
    file
}

#[test]
fn a_sector_of_a_larger_block_is_read_written_and_zeroed_and_the_others_stay() {
    for engine in BOTH {
        let mut rig = large_blocks(engine);
        let out = [rig.driver.data(&[0xaa; 100]), rig.driver.data(&[0xbb; 924])];
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_OUT, 15, &out), (OK, 1));
        assert_eq!(rig.on_disk(15, 2), [vec![0xaa; 100], vec![0xbb; 924]].concat());
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_WRITE_ZEROES, &[range(33, 2, 0)]), OK);
        assert_eq!(rig.on_disk(33, 2), [0; 1024]);
        for kept in [0, 7, 8, 14, 17, 32, 35] {
            assert_eq!(rig.on_disk(kept, 1), [kept as u8 + 1; 512]);
        }
        let room = [rig.driver.room(1), rig.driver.room(1535)];
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_IN, 14, &room), (OK, 1537));
        assert_eq!(rig.driver.read(room[0]), [15]);
        assert_eq!(rig.driver.read(room[1])[511..611], [0xaa; 100]);
        assert_eq!(rig.file.metadata().unwrap().len(), SECTORS * SECTOR_BYTES);
    }
}

#[test]
fn a_part_of_a_block_is_written_when_nothing_else_is_under_way() {
    let mut rig = large_blocks(Engine::Async);
    let flush = rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
    let sector = rig.driver.data(&[0xaa; 512]);
    let write = rig.submit(spec::VIRTIO_BLK_T_OUT, 3, &[sector]);
    for _ in 0..2 {
        rig.slot.device.handle(0);
    }
    assert_eq!((rig.driver.read(flush), rig.driver.read(write)), (vec![OK], vec![OK]));
    assert_eq!(rig.driver.reap_all().len(), 2);
    assert_eq!(rig.on_disk(3, 1), [0xaa; 512]);
    assert_eq!(rig.counter(|c| &c.flush_count), 1);
}

#[test]
fn zeroes_are_written_in_whole_blocks_by_the_ring_where_the_host_knows_no_better() {
    let rig = large_blocks(Engine::Async);
    let disk = &rig.slot.device.worker.disk;
    let memory = rig.slot.memory.memory();
    let zeroes = |offset, len| Operation::WriteZeroes { range: Extent { offset, len }, unmap: false };
    assert!(disk.takes(&memory, &zeroes(4096, 8192)).unwrap());
    for (offset, len) in [(512, 4096), (4096, 512)] {
        assert!(!disk.takes(&memory, &zeroes(offset, len)).unwrap());
    }
}

#[test]
fn a_direct_disk_serves_buffers_of_any_address() {
    for engine in BOTH {
        let mut rig = rig_with(|config| (config.file, config.engine) = (direct_file(1 << 20), engine));
        let file = rig.slot.device.worker.disk.file().try_clone().unwrap();
        assert!(rig.slot.device.worker.disk.alignment().is_some());
        for shift in [0, 16, 512, 528] {
            let data: Vec<u8> = (0..8192u32).map(|at| (at % 251) as u8 ^ shift as u8).collect();
            let out = rig.driver.data(&[vec![0; shift], data.clone(), vec![0; 4096]].concat());
            let out = Buffer { address: out.address + shift as u64, len: 8192, ..out };
            assert_eq!(rig.status(spec::VIRTIO_BLK_T_OUT, 8, &[out]), OK);
            let room = rig.driver.room(8192 + 512 + 64);
            let room = Buffer { address: room.address + shift as u64, len: 8192, ..room };
            assert_eq!(rig.request(spec::VIRTIO_BLK_T_IN, 8, &[room]), (OK, 8193));
            assert!(rig.driver.read(room) == data, "{shift}");
        }
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    }
}

#[test]
fn a_disk_is_made_of_whole_blocks_or_refused() {
    let file = direct_file(1 << 20);
    let block = Alignment::of(&file).unwrap().unwrap().block;
    for (bytes, whole) in [(0, true), (block, true), (3 * block + 511, true), (block + 512, block <= 512)] {
        file.set_len(bytes).unwrap();
        let found = disk(file.try_clone().unwrap());
        assert_eq!(found.is_ok(), whole, "{bytes} bytes in blocks of {block}");
        if let Err(error) = found {
            assert!(error.to_string().contains(&format!("a multiple of {block}")), "{error}");
        }
    }
}

#[test]
fn the_driver_is_told_of_the_blocks_of_a_direct_disk_alone() {
    let told = 1 << spec::VIRTIO_BLK_F_BLK_SIZE | 1 << spec::VIRTIO_BLK_F_TOPOLOGY;
    assert_eq!(rig().slot.device.identity().features & told, 0);
    let mut rig = rig_with(|config| config.file = direct_file(1 << 20));
    assert_eq!(rig.slot.device.identity().features & told, told);
    // Also when it gets a file that is not: it has agreed on that.
    rig.slot.device.replace(file(SECTOR_BYTES), Format::Raw).unwrap();
    assert_eq!(rig.slot.device.identity().features & told, told);

    let blocks = |logical, physical| {
        let space = config_space(0, 1, Some(Blocks { logical, physical }), Ranges::RAW);
        let size = u32::from_le_bytes(*space[20..].first_chunk().unwrap());
        (size, space[24], space[25], u16::from_le_bytes(*space[26..].first_chunk().unwrap()))
    };
    assert_eq!(blocks(512, 512), (512, 0, 0, 1));
    assert_eq!(blocks(512, 4096), (512, 3, 0, 8));
    assert_eq!(blocks(4096, 4096), (4096, 0, 0, 1));
}
