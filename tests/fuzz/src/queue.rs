//! The split queue's gate: any ring addresses, any content of guest memory.

use devices::virtio::queue::{MAX_SEGMENTS, Queue, QueueState};
use devices::virtio::testing;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;

const RAM: usize = 1 << 16;
/// More chains than any queue here holds.
const MOST_CHAINS: usize = 300;

pub fn queue(data: &[u8]) {
    crate::log_to_nowhere();
    let _ = run(&mut Input::new(data));
}

fn run(input: &mut Input) -> Option<()> {
    let state = QueueState {
        max_size: 256,
        size: 1 << (input.u8()? % 9),
        ready: true,
        event_idx: input.u8()? & 1 != 0,
        desc_table: u64::from(input.u32()?) & !15,
        avail_ring: u64::from(input.u32()?) & !1,
        used_ring: u64::from(input.u32()?) & !3,
        next_avail: input.u16()?,
        next_used: input.u16()?,
    };
    let cut = usize::from(input.u16()?);
    let memory = testing::ram(RAM);
    let view = memory.memory();
    view.write(input.rest(), GuestAddress(0)).ok();

    let mut queue = Queue::restore(0, &state, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
    assert_eq!(queue.save(), state);
    for _ in 0..MOST_CHAINS {
        let Ok(Some(mut chain)) = queue.pop(&view) else { break };
        assert!(chain.readable.list().len() + chain.writable.list().len() <= MAX_SEGMENTS + 1);
        // Only what lies in guest memory has passed.
        chain.readable.slices(&view).unwrap();
        chain.writable.slices(&view).unwrap();
        let mut some = vec![0; cut.min(chain.readable.bytes() as usize)];
        chain.readable.read(&view, &mut some).unwrap();
        chain.writable.take_last_byte();
        if let Ok(front) = chain.writable.take(cut) {
            assert_eq!(front.bytes() as usize, cut);
        }
        if queue.push(&view, chain.head, cut as u32).is_err() {
            break;
        }
        let _ = queue.wants_interrupt(&view);
        let _ = queue.enable_kicks(&view);
        let _ = queue.disable_kicks(&view);
    }
    Some(())
}
