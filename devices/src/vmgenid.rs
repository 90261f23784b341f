//! The VM generation id: 16 bytes in guest memory that change when the machine was restored or cloned, so that a guest
//! reseeds its random numbers and drops what must not be used twice (Microsoft, "Virtual Machine Generation ID").
//!
//! Does not tell the guest: whoever calls [`VmGenId::renew`] then raises
//! [`crate::acpi_pm::EVENT_GENERATION`], so that memory has changed before the guest looks.

use std::io;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::memory::Memory;
use crate::random;

/// How many bytes of guest memory it takes.
pub const LEN: u64 = 16;

/// Where the id lies.
pub struct Config {
    pub memory: Memory,
    /// Guest-physical, a multiple of 8, in RAM that the memory map reports as reserved.
    pub address: u64,
}

/// The id in the guest's memory.
pub struct VmGenId {
    config: Config,
    id: [u8; 16],
}

/// The id in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub id: [u8; 16],
}

impl VmGenId {
    /// A machine of a new generation, or the one that was saved. Fails when the address is not in guest memory or the
    /// host gives no random bytes.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Self> {
        let id = match state {
            Some(state) => state.id,
            None => random_id()?,
        };
        let generation = Self { config, id };
        generation.publish()?;
        Ok(generation)
    }

    /// Starts a new generation. The guest must be paused: it must not see half an id.
    pub fn renew(&mut self) -> io::Result<()> {
        self.id = random_id()?;
        self.publish()
    }

    pub fn save(&self) -> State {
        State { id: self.id }
    }

    fn publish(&self) -> io::Result<()> {
        let address = GuestAddress(self.config.address);
        self.config.memory.memory().write_slice(&self.id, address).map_err(io::Error::other)
    }
}

fn random_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    random::fill(&mut id)?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;

    const ADDRESS: u64 = 0xff8;

    fn memory() -> Memory {
        Memory::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap())
    }

    fn seen(memory: &Memory) -> [u8; 16] {
        memory.memory().read_obj(GuestAddress(ADDRESS)).unwrap()
    }

    #[test]
    fn a_new_machine_has_an_id_of_its_own() {
        let (one, other) = (memory(), memory());
        VmGenId::new(Config { memory: one.clone(), address: ADDRESS }, None).unwrap();
        VmGenId::new(Config { memory: other.clone(), address: ADDRESS }, None).unwrap();
        assert_ne!(seen(&one), [0; 16]);
        assert_ne!(seen(&one), seen(&other));
    }

    #[test]
    fn a_restored_machine_keeps_its_id_until_it_is_renewed() {
        let first = memory();
        let saved = VmGenId::new(Config { memory: first.clone(), address: ADDRESS }, None).unwrap().save();
        let second = memory();
        let config = Config { memory: second.clone(), address: ADDRESS };
        let mut restored = VmGenId::new(config, Some(saved.clone())).unwrap();
        assert_eq!(seen(&second), seen(&first));
        restored.renew().unwrap();
        assert_ne!(seen(&second), seen(&first));
        assert_eq!(seen(&second), restored.save().id);
    }

    #[test]
    fn an_address_outside_memory_is_an_error() {
        assert!(VmGenId::new(Config { memory: memory(), address: 0x1ff8 }, None).is_err());
    }
}
