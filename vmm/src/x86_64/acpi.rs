//! The ACPI tables (ACPI 6.5): a hardware-reduced machine, so described that an unmodified kernel finds its CPUs, PCI,
//! serial port, clock, power button, sleep and reset registers without help from the command line.
//!
//! Does not implement the registers (`devices::acpi_pm`) and describes no device it is not told of. There is no interrupt
//! routing for PCI (devices have MSI-X alone), no power management timer, no embedded controller, no S3 or S4.

use std::ops::Range;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed,
    Method, MethodCall, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Package, Path,
    ResourceTemplate, Return, Store, Uuid, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as RegisterSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use devices::acpi_pm;
use devices::memory::GuestRam;
use devices::pci::{hotplug, root};
use vm_memory::{Bytes, GuestAddress};

use super::layout;

/// What the tables describe, beside what every machine has: local APICs, I/O APIC, power button, sleep and reset.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// From 1 to [`layout::MAX_VCPUS`].
    pub vcpus: u32,
    /// The PCI host bridge. A machine without one has the configuration space at [`layout::ECAM`] nevertheless, with
    /// nobody in it: a Linux that finds none at all says so on the console, at two exits for each of the 65 characters.
    pub pci: Option<PciWindows>,
    pub virtio_mmio: Vec<VirtioMmio>,
    /// COM1 at [`layout::SERIAL`].
    pub serial: bool,
    /// The clock at [`layout::RTC`].
    pub rtc: bool,
    /// The VM generation ID at [`layout::VMGENID`].
    pub vmgenid: bool,
    /// The panic port at [`layout::PVPANIC`].
    pub pvpanic: bool,
}

/// Guest-physical ranges that the host bridge hands to BARs; neither is empty.
#[derive(Clone, Debug)]
pub struct PciWindows {
    pub below_4g: Range<u64>,
    pub above_4g: Range<u64>,
}

/// A virtio-mmio device.
#[derive(Clone, Copy, Debug)]
pub struct VirtioMmio {
    /// Of [`layout::VIRTIO_MMIO_SIZE`] bytes, in [`layout::VIRTIO_MMIO`].
    pub base: u64,
    /// Raised as an edge.
    pub gsi: u32,
}

/// Why the guest has no tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("the ACPI tables take {len} bytes; there is room for {}", layout::ACPI.end - layout::ACPI.start)]
    TooLong { len: usize },
    #[error("cannot write ACPI tables to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes all tables to [`layout::ACPI`], the RSDP first. Before the guest runs.
pub fn write(ram: &GuestRam, tables: &Tables) -> Result<(), AcpiError> {
    let bytes = build(tables);
    if bytes.len() as u64 > layout::ACPI.end - layout::ACPI.start {
        return Err(AcpiError::TooLong { len: bytes.len() });
    }
    Ok(ram.write_slice(&bytes, GuestAddress(layout::ACPI.start))?)
}

const OEM_ID: [u8; 6] = *b"BERTH ";
const OEM_TABLE_ID: [u8; 8] = *b"BERTHVMM";
const OEM_REVISION: u32 = 1;
/// Revision 2 of the DSDT: integers of 64 bits.
const DSDT_REVISION: u8 = 2;
const SDT_HEADER: u32 = 36;

/// Everything from [`layout::ACPI`] on, each table on a 16-byte boundary as the RSDP must be.
fn build(tables: &Tables) -> Vec<u8> {
    let mut blob = vec![0; Rsdp::len()];
    let mut place = |table: &dyn Aml| {
        blob.resize(blob.len().next_multiple_of(16), 0);
        let address = layout::ACPI.start + blob.len() as u64;
        table.to_aml_bytes(&mut blob);
        address
    };
    let dsdt = place(&Raw(dsdt(tables).as_slice()));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(place(&fadt(tables, dsdt)));
    xsdt.add_entry(place(&madt(tables)));
    xsdt.add_entry(place(&mcfg()));
    let rsdp = Rsdp::new(OEM_ID, place(&xsdt));
    let mut head = Vec::new();
    rsdp.to_aml_bytes(&mut head);
    blob.splice(..head.len(), head);
    blob
}

/// Bytes that are a table already.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

// FADT (5.2.9)

/// IAPC_BOOT_ARCH (table 5.10): do not look for VGA. No flag says that there is an i8042: what is behind its ports is the
/// reset line alone, and a kernel that probes for a keyboard makes two dozen exits for nothing.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

fn fadt(tables: &Tables, dsdt: u64) -> impl Aml + use<> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set means absent: the power button is a device in the DSDT, a sleep button there is not.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let no_rtc = if tables.rtc { 0 } else { CMOS_RTC_NOT_PRESENT };
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | no_rtc).into();
    fadt.sleep_control_reg = register(acpi_pm::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(acpi_pm::SLEEP_STATUS);
    fadt.reset_reg = register(acpi_pm::RESET);
    fadt.reset_value = acpi_pm::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

/// A byte register of the block at [`layout::ACPI_PM`].
fn register(offset: u64) -> GAS {
    GAS::new(RegisterSpace::SystemIo, 8, 0, AccessSize::ByteAccess, layout::ACPI_PM.start + offset)
}

// MADT (5.2.12) and MCFG (PCI Firmware Specification 3.3, 4.1.2)

/// Without the PCAT_COMPAT flag: there are no PICs to mask first.
fn madt(tables: &Tables) -> MADT {
    let lapic = LocalInterruptController::Address(layout::LAPIC.start as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for vcpu in vcpus(tables) {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC.start as u32, 0));
    madt
}

/// Processor UIDs, which are APIC ids.
fn vcpus(tables: &Tables) -> impl Iterator<Item = u8> + use<> {
    (0..tables.vcpus.min(layout::MAX_VCPUS)).map(|vcpu| vcpu as u8)
}

/// Announced also where there is no PCI, and `pci=off` is not added there: without a way to the configuration space, and
/// with that argument, Linux prints an error even when it is `quiet`, which costs half of all exits of a boot.
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, 0);
    mcfg
}

// DSDT

fn dsdt(tables: &Tables) -> Sdt {
    let mut aml = Vec::new();
    sleep_states(&mut aml);
    vcpus(tables).for_each(|vcpu| processor(vcpu, &mut aml));
    power_button(&mut aml);
    if tables.vmgenid {
        generation_id(&mut aml);
    }
    event_device(tables.vmgenid, tables.pci.is_some(), &mut aml);
    if tables.serial {
        serial_port(&mut aml);
    }
    if tables.rtc {
        clock(&mut aml);
    }
    if tables.pvpanic {
        panic_port(&mut aml);
    }
    for (index, device) in (0..).zip(&tables.virtio_mmio) {
        virtio_mmio(index, device, &mut aml);
    }
    configuration_space(&mut aml);
    if let Some(windows) = &tables.pci {
        host_bridge(windows, &mut aml);
    }
    let mut dsdt = Sdt::new(*b"DSDT", SDT_HEADER, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// \_S5 (7.4.2.6), the only state but running: its sleep type for SLEEP_CONTROL.
fn sleep_states(sink: &mut Vec<u8>) {
    let package = Package::new(vec![&acpi_pm::S5_SLP_TYP, &ZERO, &ZERO, &ZERO]);
    Name::new("\\_S5_".into(), &package).to_aml_bytes(sink);
}

fn processor(vcpu: u8, sink: &mut Vec<u8>) {
    let path = format!("\\_SB_.C{vcpu:03X}");
    device(&path, &"ACPI0007", &vcpu, &[], sink);
}

fn power_button(sink: &mut Vec<u8>) {
    device(POWER_BUTTON, &EISAName::new("PNP0C0C"), &ZERO, &[], sink);
}

const POWER_BUTTON: &str = "\\_SB_.PWRB";
const GENERATION_ID: &str = "\\_SB_.VGEN";

/// The VM generation ID (Microsoft, "Virtual Machine Generation ID"): ADDR returns the low and high half of the
/// address of its 16 bytes.
fn generation_id(sink: &mut Vec<u8>) {
    let address = layout::VMGENID.start;
    let halves = (address as u32, (address >> 32) as u32);
    let address = Name::new("ADDR".into(), &Package::new(vec![&halves.0, &halves.1]));
    let compatible = Name::new("_CID".into(), &"VM_Gen_Counter");
    let description = Name::new("_DDN".into(), &"VM_Gen_Counter");
    device(GENERATION_ID, &"BRTH0001", &ZERO, &[&compatible, &description, &address], sink);
}

/// The generic event device (5.6.9): its interrupt makes the guest read the event register and pass each event on.
fn event_device(generation_id: bool, pci: bool, sink: &mut Vec<u8>) {
    let (base, len) = (layout::ACPI_PM.start as u16 + acpi_pm::EVENTS as u16, 4u8);
    let region = OpRegion::new("EVTS".into(), OpRegionSpace::SystemIO, &base, &len);
    let fields = Field::new(
        "EVTS".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"EVNT", 32)],
    );

    /// What a control method button or a generation ID is notified with.
    const CHANGED: u8 = 0x80;
    // Reading clears the register, so it is read once.
    let (events, register) = (Local(0), Path::new("EVNT"));
    let read = Store::new(&events, &register);
    let (button, button_bit) = (Path::new(POWER_BUTTON), acpi_pm::EVENT_POWER_BUTTON);
    let pressed = And::new(&ZERO, &events, &button_bit);
    let press = Notify::new(&button, &CHANGED);
    let if_pressed = If::new(&pressed, vec![&press]);
    let (counter, counter_bit) = (Path::new(GENERATION_ID), acpi_pm::EVENT_GENERATION);
    let changed = And::new(&ZERO, &events, &counter_bit);
    let change = Notify::new(&counter, &CHANGED);
    let if_changed = If::new(&changed, vec![&change]);
    let (look, pci_bit) = (MethodCall::new(Path::new(LOOK_AT_SLOTS), vec![]), acpi_pm::EVENT_PCI);
    let plugged = And::new(&ZERO, &events, &pci_bit);
    let if_plugged = If::new(&plugged, vec![&look]);
    let mut body: Vec<&dyn Aml> = vec![&read, &if_pressed];
    if generation_id {
        body.push(&if_changed);
    }
    if pci {
        body.push(&if_plugged);
    }
    let method = Method::new("_EVT".into(), 1, true, body);

    let interrupt = edge(layout::GED_GSI);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt]));
    device("\\_SB_.GED_", &"ACPI0013", &ZERO, &[&resources, &region, &fields, &method], sink);
}

fn serial_port(sink: &mut Vec<u8>) {
    let (ports, interrupt) = (ports(&layout::SERIAL), edge(layout::SERIAL_GSI));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt]));
    let description = Name::new("_DDN".into(), &"COM1");
    device("\\_SB_.COM1", &EISAName::new("PNP0501"), &ONE, &[&description, &resources], sink);
}

/// Without an interrupt: the clock has no alarm.
fn clock(sink: &mut Vec<u8>) {
    let ports = ports(&layout::RTC);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports]));
    device("\\_SB_.RTC_", &EISAName::new("PNP0B00"), &ZERO, &[&resources], sink);
}

fn panic_port(sink: &mut Vec<u8>) {
    let ports = ports(&layout::PVPANIC);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports]));
    device("\\_SB_.PEVT", &"QEMU0001", &ZERO, &[&resources], sink);
}

fn virtio_mmio(index: u32, virtio: &VirtioMmio, sink: &mut Vec<u8>) {
    let registers = Memory32Fixed::new(true, virtio.base as u32, layout::VIRTIO_MMIO_SIZE as u32);
    let interrupt = edge(virtio.gsi);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt]));
    let path = format!("\\_SB_.V{index:03X}");
    device(&path, &"LNRO0005", &index, &[&resources], sink);
}

/// The motherboard resource that the ECAM must be part of, or kernels do not believe in it.
fn configuration_space(sink: &mut Vec<u8>) {
    let ecam =
        Memory32Fixed::new(true, layout::ECAM.start as u32, (layout::ECAM.end - layout::ECAM.start) as u32);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam]));
    device("\\_SB_.MBRD", &EISAName::new("PNP0C02"), &ZERO, &[&resources], sink);
}

/// The PCI Express host bridge with its one bus.
fn host_bridge(windows: &PciWindows, sink: &mut Vec<u8>) {
    let (low, high) = (&windows.below_4g, &windows.above_4g);
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let low = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low.start as u32,
        (low.end - 1) as u32,
        None,
    );
    let high =
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, high.start, high.end - 1, None);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&bus, &low, &high]));
    let compatible = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let segment = Name::new("_SEG".into(), &ZERO);
    let first_bus = Name::new("_BBN".into(), &ZERO);
    let mut control = Vec::new();
    operating_system_capabilities(&mut control);
    let control = Raw(&control);
    let mut slots = Vec::new();
    hot_plug(&mut slots);
    let slots = Raw(&slots);
    let members: [&dyn Aml; 6] = [&compatible, &segment, &first_bus, &resources, &control, &slots];
    device("\\_SB_.PCI0", &EISAName::new("PNP0A08"), &ZERO, &members, sink);
}

/// Calls the notifications of [`hotplug`]'s registers.
const LOOK_AT_SLOTS: &str = "\\_SB_.PCI0.LOOK";

/// An object for each slot but the host bridge's, which makes it one whose function may come and go (6.3.3), and the method
/// that passes on what the registers say.
fn hot_plug(sink: &mut Vec<u8>) {
    let (base, len) = (layout::PCI_HOTPLUG.start as u16, hotplug::LEN as u8);
    OpRegion::new("PLUG".into(), OpRegionSpace::SystemIO, &base, &len).to_aml_bytes(sink);
    // In the order of the registers.
    let fields = [*b"CHGD", *b"WANT", *b"EJCT"].map(|name| FieldEntry::Named(name, 32));
    Field::new(
        "PLUG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.into(),
    )
    .to_aml_bytes(sink);

    let (changed, wanted) = (Local(0), Local(1));
    let mut look = Vec::new();
    // Reading clears, so each is read once.
    Store::new(&changed, &Path::new("CHGD")).to_aml_bytes(&mut look);
    Store::new(&wanted, &Path::new("WANT")).to_aml_bytes(&mut look);
    for slot in 1..root::SLOTS as u32 {
        let (name, bit) = (format!("S{slot:03X}"), 1u32 << slot);
        let (address, register) = (slot << 16, Path::new("EJCT"));
        let eject = Store::new(&register, &bit);
        let eject = Method::new("_EJ0".into(), 1, true, vec![&eject]);
        let (address, number) = (Name::new("_ADR".into(), &address), Name::new("_SUN".into(), &slot));
        Device::new(name.as_str().into(), vec![&address, &number, &eject]).to_aml_bytes(sink);

        let object = Path::new(&name);
        for (slots, what) in [(&changed, hotplug::DEVICE_CHECK), (&wanted, hotplug::EJECT_REQUEST)] {
            let is_meant = And::new(&ZERO, slots, &bit);
            let tell = Notify::new(&object, &what);
            If::new(&is_meant, vec![&tell]).to_aml_bytes(&mut look);
        }
    }
    Method::new("LOOK".into(), 0, true, vec![&Raw(&look)]).to_aml_bytes(sink);
}

/// _OSC of the host bridge (PCI Firmware Specification 3.3, 4.5.1): the guest may have control of what it asks for, but
/// not of hotplug, which would be by notification. Without the method kernels complain.
fn operating_system_capabilities(sink: &mut Vec<u8>) {
    /// PME, AER, PCI Express capability structures, LTR.
    const GRANTED: u8 = 0x3c;
    // Bits of the first dword in the answer (6.2.11).
    const UNKNOWN_UUID: u8 = 1 << 2;
    const UNKNOWN_REVISION: u8 = 1 << 3;
    const CAPABILITIES_MASKED: u8 = 1 << 4;
    let uuid = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    let (revision, buffer, granted) = (Arg(1), Arg(3), Local(0));
    let (status, wanted) = (Path::new("CDW1"), Path::new("CDW3"));
    let (at_0, at_8) = (0u8, 8u8);
    let status_field = CreateDWordField::new(&status, &buffer, &at_0);
    let wanted_field = CreateDWordField::new(&wanted, &buffer, &at_8);
    let grant = And::new(&granted, &wanted, &GRANTED);
    let masked = NotEqual::new(&granted, &wanted);
    let tell_masked = Or::new(&status, &status, &CAPABILITIES_MASKED);
    let if_masked = If::new(&masked, vec![&tell_masked]);
    let unknown_revision = NotEqual::new(&revision, &ONE);
    let tell_revision = Or::new(&status, &status, &UNKNOWN_REVISION);
    let if_unknown_revision = If::new(&unknown_revision, vec![&tell_revision]);
    let answer = Store::new(&wanted, &granted);
    let asked = Equal::new(&Arg(0), &uuid);
    let if_asked = If::new(&asked, vec![&wanted_field, &grant, &if_masked, &if_unknown_revision, &answer]);
    let tell_uuid = Or::new(&status, &status, &UNKNOWN_UUID);
    let or_else = Else::new(vec![&tell_uuid]);
    let result = Return::new(&buffer);
    Method::new("_OSC".into(), 4, true, vec![&status_field, &if_asked, &or_else, &result]).to_aml_bytes(sink);
}

/// A device with its hardware ID, its unique ID among those with the same, and `members`.
fn device(path: &str, hid: &dyn Aml, uid: &dyn Aml, members: &[&dyn Aml], sink: &mut Vec<u8>) {
    let hid = Name::new("_HID".into(), hid);
    let uid = Name::new("_UID".into(), uid);
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
    children.extend(members);
    Device::new(path.into(), children).to_aml_bytes(sink);
}

/// Interrupts here are edges on I/O APIC pins: an eventfd has no level to hold.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn ports(range: &Range<u64>) -> IO {
    IO::new(range.start as u16, range.start as u16, 1, (range.end - range.start) as u8)
}

#[cfg(test)]
mod tests;
