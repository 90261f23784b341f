//! The device that tests of transports put behind them.

use std::sync::Arc;

use crate::backend::rate_limiter::Limits;
use crate::host::Source;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, Interrupt, StartError, VirtioDevice, read_space,
};
use crate::virtio::queue::Queue;
use crate::virtio::rng::{self, Rng};
use crate::virtio::running::{Running, Step};
use crate::virtio::testing::EVENT_IDX;

/// A feature that means nothing.
pub const ODD_FEATURE: u64 = 1 << 5;

/// A device with two queues that gives back what it gets.
pub struct Echo {
    running: Option<Running>,
    /// What it offers.
    pub features: u64,
    pub config: [u8; 8],
    /// What it got when it was started last.
    pub interrupt: Option<Arc<dyn Interrupt>>,
    /// How often its driver reset it.
    pub resets: usize,
    /// How often it was told that guest memory has changed.
    pub memory_changes: usize,
    /// It does not start.
    pub refuse: bool,
}

impl Default for Echo {
    fn default() -> Self {
        let features = EVENT_IDX | ODD_FEATURE;
        Self {
            running: None,
            features,
            config: [0; 8],
            interrupt: None,
            resets: 0,
            memory_changes: 0,
            refuse: false,
        }
    }
}

impl Echo {
    pub fn runs(&self) -> bool {
        self.running.is_some()
    }
}

impl VirtioDevice for Echo {
    fn identity(&self) -> Identity {
        Identity {
            device_type: DeviceType::Block,
            features: self.features,
            queue_sizes: vec![8, 4],
            config_bytes: 8,
        }
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (byte, value) in self.config.iter_mut().skip(offset as usize).zip(data) {
            *byte = *value;
        }
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        if self.refuse {
            return Err(StartError::Queues { got: 0, needed: 2 });
        }
        self.interrupt = Some(active.interrupt.clone());
        let (running, sources) = Running::start(active, 2)?;
        self.running = Some(running);
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        self.running.as_mut().unwrap().serve(token as u16, |_, _| Ok(Step::Used(0)));
    }

    fn memory_changed(&mut self) {
        self.memory_changes += 1;
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    fn reset(&mut self) {
        assert!(self.running.is_none());
        self.resets += 1;
    }

    fn save(&self) -> DeviceState {
        assert!(self.running.is_none());
        Rng::new(rng::Config { limits: Limits::default() }, None).unwrap().save()
    }
}
