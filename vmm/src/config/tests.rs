use std::io::{Read, Seek};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use api_socket::{BackingFile, CacheType, ConsolePort, DiskFormat, LogLevel, RateLimiter, VmState};

use devices::virtio::console::Size;

use super::console::Change;
use super::*;

/// A configuration and files to point it at.
/// Bytes of metadata.
const MMDS_LIMIT: usize = 1000;

struct Fixture {
    dir: tempfile::TempDir,
    config: Config,
}

fn fixture() -> Fixture {
    fixture_as(Identity::Berth)
}

fn fixture_as(identity: Identity) -> Fixture {
    let pci = identity == Identity::Berth;
    Fixture {
        dir: tempfile::tempdir().unwrap(),
        config: Config::new(identity, pci, MMDS_LIMIT, Handed::default()).unwrap(),
    }
}

impl Fixture {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, name).unwrap();
        path
    }

    #[track_caller]
    fn accept(&mut self, request: Request) {
        assert_eq!(self.config.apply(request), Ok(Reply::Empty));
    }

    /// The request is refused with a text that has all these words, and nothing is changed by it.
    #[track_caller]
    fn refuse(&mut self, request: Request, words: &[&str]) {
        let before = self.config.wire();
        match self.config.apply(request) {
            Ok(Reply::Fault(fault)) => {
                assert_eq!(fault.status, 400);
                for word in words {
                    assert!(fault.message.contains(word), "{word:?} is not in: {fault}");
                }
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(self.config.wire(), before);
    }

    fn drive(&self, id: &str, root: bool) -> api_socket::Drive {
        let path_on_host = Some(self.file(id));
        api_socket::Drive {
            drive_id: id.to_string(),
            is_root_device: root,
            path_on_host,
            ..Default::default()
        }
    }

    /// The file of the drive in this place.
    fn opened(&self, place: usize) -> File {
        self.files(place).image
    }

    fn files(&self, place: usize) -> Files {
        match self.config.drives().unwrap().remove(place).backing {
            Backing::Files(files) => files,
            other => panic!("{other:?}"),
        }
    }

    fn ids(&self) -> Vec<String> {
        self.config.drives().unwrap().into_iter().map(|drive| drive.settings.drive_id).collect()
    }

    fn boot_source(&self) -> BootSource {
        BootSource { kernel_image_path: self.file("kernel"), ..Default::default() }
    }
}

fn machine() -> MachineConfig {
    MachineConfig::default()
}

fn content(file: &File) -> String {
    let mut text = String::new();
    let mut file = file.try_clone().unwrap();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

fn make_fifo(path: &Path) {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: `name` is a string that ends with NUL.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
}

#[test]
fn an_untouched_machine_has_one_cpu_and_128_mib() {
    let mut fixture = fixture();
    let reply = fixture.config.apply(Request::GetMachineConfig).unwrap();
    assert_eq!(reply, Reply::MachineConfig(MachineConfig::default()));
    let expected = Machine {
        vcpus: 1,
        smt: false,
        memory: ByteSize::ram_of_mib(128).unwrap(),
        pages: Pages::Base,
        track_dirty_pages: false,
    };
    assert_eq!(fixture.config.machine, expected);
}

#[test]
fn every_field_of_the_machine_arrives_and_is_told_back() {
    let mut fixture = fixture();
    for (huge_pages, pages) in [
        (HugePages::None, Pages::Base),
        (HugePages::Transparent, Pages::Transparent),
        (HugePages::Hugetlbfs2M, Pages::Huge2M),
    ] {
        let config = MachineConfig {
            vcpu_count: 4,
            mem_size_mib: 512,
            smt: true,
            cpu_template: None,
            track_dirty_pages: true,
            huge_pages,
        };
        fixture.accept(Request::PutMachineConfig(config.clone()));
        let memory = ByteSize::ram_of_mib(512).unwrap();
        let expected = Machine { vcpus: 4, smt: true, memory, pages, track_dirty_pages: true };
        assert_eq!(fixture.config.machine, expected);
        assert_eq!(fixture.config.apply(Request::GetMachineConfig), Ok(Reply::MachineConfig(config)));
    }
}

#[test]
fn vcpu_count_is_1_to_32() {
    let mut fixture = fixture();
    for vcpu_count in [1, 2, 3, 31, 32] {
        fixture.accept(Request::PutMachineConfig(MachineConfig { vcpu_count, ..machine() }));
    }
    for vcpu_count in [0, 33, 255] {
        let request = Request::PutMachineConfig(MachineConfig { vcpu_count, ..machine() });
        fixture.refuse(request, &["`vcpu_count`", &vcpu_count.to_string(), "from 1 to 32"]);
    }
}

#[test]
fn with_smt_vcpu_count_is_1_or_even() {
    let mut fixture = fixture();
    let put = |vcpu_count| Request::PutMachineConfig(MachineConfig { vcpu_count, smt: true, ..machine() });
    for vcpu_count in [1, 2, 4, 32] {
        fixture.accept(put(vcpu_count));
    }
    for vcpu_count in [3, 5, 31] {
        fixture.refuse(put(vcpu_count), &["`vcpu_count`", "`smt`", "1 or even"]);
    }
}

#[test]
fn mem_size_mib_is_more_than_nothing_and_less_than_the_map() {
    let mut fixture = fixture();
    let put = |mem_size_mib| Request::PutMachineConfig(MachineConfig { mem_size_mib, ..machine() });
    for mib in [1, 16, 5 * 1024] {
        fixture.accept(put(mib));
    }
    for mib in [0, 1 << 27, u64::MAX >> 20, u64::MAX] {
        fixture.refuse(put(mib), &["mem_size_mib", &mib.to_string()]);
    }
}

#[test]
fn with_huge_pages_mem_size_mib_is_even() {
    let mut fixture = fixture();
    for huge_pages in [HugePages::Transparent, HugePages::Hugetlbfs2M] {
        let put =
            |mem_size_mib| Request::PutMachineConfig(MachineConfig { mem_size_mib, huge_pages, ..machine() });
        fixture.accept(put(130));
        fixture.refuse(put(129), &["`mem_size_mib`", "129", "`huge_pages`", "multiple of 2"]);
    }
}

#[test]
fn a_cpu_template_is_refused_but_for_none() {
    let mut fixture = fixture();
    let put =
        |template| Request::PutMachineConfig(MachineConfig { cpu_template: Some(template), ..machine() });
    fixture.accept(put(CpuTemplate::None));
    for template in [CpuTemplate::C3, CpuTemplate::T2, CpuTemplate::T2S, CpuTemplate::T2CL, CpuTemplate::T2A]
    {
        fixture.refuse(put(template), &["`cpu_template`", &format!("{template:?}"), "/cpu-config"]);
    }
}

#[test]
fn a_patch_changes_what_it_names_and_the_whole_must_fit() {
    let mut fixture = fixture();
    let patch = |update| Request::PatchMachineConfig(update);
    fixture.accept(patch(MachineConfigUpdate { vcpu_count: Some(3), ..Default::default() }));
    fixture.accept(patch(MachineConfigUpdate { mem_size_mib: Some(257), ..Default::default() }));
    fixture.accept(patch(MachineConfigUpdate { track_dirty_pages: Some(true), ..Default::default() }));
    let expected = MachineConfig { vcpu_count: 3, mem_size_mib: 257, track_dirty_pages: true, ..machine() };
    assert_eq!(fixture.config.machine.wire(), expected);

    let smt = MachineConfigUpdate { smt: Some(true), ..Default::default() };
    fixture.refuse(patch(smt), &["`vcpu_count` is 3", "`smt`"]);
    let huge = MachineConfigUpdate { huge_pages: Some(HugePages::Hugetlbfs2M), ..Default::default() };
    fixture.refuse(patch(huge), &["257", "`huge_pages`"]);
    let template = MachineConfigUpdate { cpu_template: Some(CpuTemplate::T2), ..Default::default() };
    fixture.refuse(patch(template), &["`cpu_template`"]);
    let both = MachineConfigUpdate { vcpu_count: Some(4), smt: Some(true), ..Default::default() };
    fixture.accept(patch(both));
    assert!(fixture.config.machine.smt);
}

#[test]
fn kernel_and_initrd_are_open_files_from_the_request_on() {
    let mut fixture = fixture();
    let source = BootSource {
        initrd_path: Some(fixture.file("initrd")),
        boot_args: Some("quiet".to_string()),
        ..fixture.boot_source()
    };
    fixture.accept(Request::PutBootSource(source.clone()));
    // What happens to the names later does not matter.
    std::fs::remove_file(fixture.path("kernel")).unwrap();
    std::fs::remove_file(fixture.path("initrd")).unwrap();
    let boot = fixture.config.boot().unwrap();
    assert_eq!(content(&boot.kernel), "kernel");
    assert_eq!(content(boot.initrd.as_ref().unwrap()), "initrd");
    assert_eq!(fixture.config.wire().boot_source, source);
}

#[test]
fn a_boot_source_may_be_given_again() {
    let mut fixture = fixture();
    let first = BootSource { initrd_path: Some(fixture.file("initrd")), ..fixture.boot_source() };
    fixture.accept(Request::PutBootSource(first));
    let second = BootSource { kernel_image_path: fixture.file("other"), ..Default::default() };
    fixture.accept(Request::PutBootSource(second));
    let boot = fixture.config.boot().unwrap();
    assert_eq!(content(&boot.kernel), "other");
    assert!(boot.initrd.is_none());
}

#[test]
fn a_kernel_or_initrd_that_cannot_be_opened_is_named() {
    let mut fixture = fixture();
    let pipe = fixture.path("pipe");
    make_fifo(&pipe);
    let directory = fixture.dir.path().to_path_buf();
    for (path, words) in [
        (fixture.path("gone"), ["gone", "No such file"]),
        (directory, ["", "no file"]),
        (pipe, ["pipe", "no file"]),
        ("/dev/null".into(), ["/dev/null", "no file"]),
        ("".into(), ["", "cannot be opened"]),
    ] {
        let kernel = BootSource { kernel_image_path: path.clone(), ..Default::default() };
        fixture.refuse(Request::PutBootSource(kernel), &["`kernel_image_path`", words[0], words[1]]);
        let initrd = BootSource { initrd_path: Some(path), ..fixture.boot_source() };
        fixture.refuse(Request::PutBootSource(initrd), &["`initrd_path`", words[0], words[1]]);
    }
}

#[test]
fn boot_args_are_printable_and_fit() {
    let mut fixture = fixture();
    let put = |fixture: &Fixture, args: &str| {
        Request::PutBootSource(BootSource { boot_args: Some(args.to_string()), ..fixture.boot_source() })
    };
    for good in ["", "quiet", &"x".repeat(cmdline::MAX_LENGTH)] {
        let request = put(&fixture, good);
        fixture.accept(request);
    }
    for (bad, word) in [("a\nb", "printable"), (&*"x".repeat(cmdline::MAX_LENGTH + 1), "too long")] {
        let request = put(&fixture, bad);
        fixture.refuse(request, &["`boot_args`", word]);
    }
}

#[test]
fn without_a_kernel_there_is_nothing_to_boot() {
    let fault = fixture().config.boot().unwrap_err();
    assert!(fault.message.contains("kernel_image_path") && fault.message.contains("/boot-source"), "{fault}");
}

#[test]
fn a_command_line_has_the_arguments_and_then_ours() {
    let mut berth = fixture();
    assert_eq!(berth.config.command_line("").unwrap(), "console=ttyS0 reboot=k panic=1");
    let mut firecracker = fixture_as(Identity::Firecracker);
    assert_eq!(
        firecracker.config.command_line("more=1").unwrap(),
        "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce more=1"
    );
    for fixture in [&mut berth, &mut firecracker] {
        let source = BootSource { boot_args: Some("a -- b".to_string()), ..fixture.boot_source() };
        fixture.accept(Request::PutBootSource(source));
        let drive = fixture.drive("rootfs", true);
        fixture.accept(Request::PutDrive(drive));
        assert_eq!(fixture.config.command_line("x").unwrap(), "a root=/dev/vda rw x -- b");
    }
    let empty = BootSource { boot_args: Some(String::new()), ..berth.boot_source() };
    berth.accept(Request::PutBootSource(empty));
    assert_eq!(
        berth.config.command_line("").unwrap(),
        "root=/dev/vda rw",
        "given and empty is not the default"
    );
}

#[test]
fn a_command_line_that_gets_too_long_by_our_arguments_is_refused() {
    let mut fixture = fixture();
    let args = "x".repeat(cmdline::MAX_LENGTH);
    let source = BootSource { boot_args: Some(args), ..fixture.boot_source() };
    fixture.accept(Request::PutBootSource(source));
    let fault = fixture.config.command_line("virtio_mmio.device=x").unwrap_err();
    assert!(fault.message.contains("`boot_args`") && fault.message.contains("too long"), "{fault}");
}

#[test]
fn the_root_argument_tells_partition_and_mode() {
    for (partuuid, is_read_only, expected) in [
        (None, None, "root=/dev/vda rw"),
        (None, Some(false), "root=/dev/vda rw"),
        (None, Some(true), "root=/dev/vda ro"),
        (Some("0eaa91a0-01"), None, "root=PARTUUID=0eaa91a0-01 rw"),
        (Some("0eaa91a0-01/PARTNROFF=1"), Some(true), "root=PARTUUID=0eaa91a0-01/PARTNROFF=1 ro"),
    ] {
        let mut fixture = fixture();
        let partuuid = partuuid.map(str::to_string);
        let drive = api_socket::Drive { partuuid, is_read_only, ..fixture.drive("a", true) };
        fixture.accept(Request::PutDrive(drive));
        assert!(fixture.config.command_line("").unwrap().ends_with(expected), "{expected}");
    }
    let mut fixture = fixture();
    let data = fixture.drive("data", false);
    fixture.accept(Request::PutDrive(data));
    assert!(!fixture.config.command_line("").unwrap().contains("root="));
}

#[test]
fn every_field_of_a_drive_arrives_and_is_told_back() {
    let mut fixture = fixture();
    let limit = TokenBucket { size: 1, one_time_burst: Some(2), refill_time: 3 };
    let drive = api_socket::Drive {
        partuuid: Some("abc-01".to_string()),
        cache_type: CacheType::Writeback,
        is_read_only: Some(true),
        rate_limiter: Some(RateLimiter { bandwidth: Some(limit), ops: None }),
        io_engine: Some(IoEngine::Sync),
        queues: Some(4),
        io_thread: Some(3),
        direct: Some(true),
        ..fixture.drive("a", true)
    };
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(fixture.path("a")).unwrap());
    fixture.accept(Request::PutDrive(drive.clone()));
    assert_eq!(fixture.config.wire().drives, std::slice::from_ref(&drive));
    let drives = fixture.config.drives().unwrap();
    assert_eq!(drives[0].settings, drive);
    assert_eq!(std::os::unix::fs::MetadataExt::ino(&fixture.opened(0).metadata().unwrap()), inode);
}

#[test]
fn a_drive_has_the_engine_that_is_asked_for() {
    let mut fixture = fixture();
    for (io_engine, expected) in
        [(None, Engine::Sync), (Some(IoEngine::Sync), Engine::Sync), (Some(IoEngine::Async), Engine::Async)]
    {
        let drive = api_socket::Drive { io_engine, ..fixture.drive("a", false) };
        fixture.accept(Request::PutDrive(drive));
        assert_eq!(engine(&fixture.config.drives().unwrap()[0].settings), expected);
    }
}

#[test]
fn a_drive_has_as_many_queues_as_the_device_can_have_and_no_more() {
    assert_eq!(u16::from(*QUEUES.end()), devices::virtio::blk::MAX_QUEUES);
    let mut fixture = fixture();
    let with = |queues| {
        let fixture = &fixture;
        Request::PutDrive(api_socket::Drive { queues: Some(queues), ..fixture.drive("a", false) })
    };
    let [none, most, more] = [0, 16, 17].map(with);
    for request in [none, more] {
        fixture.refuse(request, &["`queues` is", "1 to 16"]);
    }
    fixture.accept(most);
}

/// The blocks that direct I/O on this file wants, if it is that.
fn blocks(file: &File) -> Option<u64> {
    devices::backend::direct::Alignment::of(file).unwrap().map(|alignment| alignment.block)
}

#[test]
fn a_drive_is_direct_when_it_is_asked_for_and_its_next_file_too() {
    let mut fixture = fixture();
    let next = fixture.file("next");
    for (direct, expected) in [(None, false), (Some(false), false), (Some(true), true)] {
        let drive = api_socket::Drive { direct, ..fixture.drive("a", false) };
        fixture.accept(Request::PutDrive(drive.clone()));
        assert_eq!(blocks(&fixture.opened(0)).is_some(), expected);
        assert_eq!(blocks(&fixture.config.open_disk(&next, &drive).unwrap()).is_some(), expected);
    }
}

#[test]
fn a_direct_drive_that_cannot_be_is_refused_with_the_reason() {
    let mut fixture = fixture();
    let path = fixture.file("odd");
    let direct = api_socket::Drive {
        direct: Some(true),
        path_on_host: Some(path.clone()),
        ..fixture.drive("a", false)
    };
    fixture.accept(Request::PutDrive(direct.clone()));
    let block = blocks(&fixture.opened(0)).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(block + 512).unwrap();
    if block > 512 {
        let words = ["`direct`", "odd", &format!("multiple of {block}"), "Leave `direct` out"];
        fixture.refuse(Request::PutDrive(direct), &words);
    }
    let sink = api_socket::Drive {
        direct: Some(true),
        path_on_host: Some("/proc/version".into()),
        is_read_only: Some(true),
        ..fixture.drive("b", false)
    };
    fixture.refuse(Request::PutDrive(sink), &["`direct`", "/proc/version", "Leave `direct` out"]);
}

#[test]
fn a_file_that_was_handed_over_once_is_direct_for_all_drives_or_none() {
    let mut fixture = fixture();
    let path = fixture.file("disk");
    let file = File::options().read(true).write(true).open(path).unwrap();
    let number = std::os::fd::IntoRawFd::into_raw_fd(file);
    fixture.config.handed = Handed::take(&[("disk".into(), number)]).unwrap();
    let drive = |fixture: &Fixture, id: &str, direct| api_socket::Drive {
        direct,
        path_on_host: Some("fd:disk".into()),
        ..fixture.drive(id, false)
    };
    let [cached, direct, also, again] = [("a", None), ("b", Some(true)), ("b", None), ("a", Some(true))]
        .map(|(id, direct)| drive(&fixture, id, direct));
    fixture.accept(Request::PutDrive(cached));
    fixture.refuse(Request::PutDrive(direct.clone()), &["`direct`", "drive \"a\"", "fd:disk"]);
    assert_eq!(blocks(&fixture.opened(0)), None);
    fixture.accept(Request::PutDrive(again));
    fixture.accept(Request::PutDrive(direct));
    // It has no choice any more.
    fixture.accept(Request::PutDrive(also));
    assert!((0..fixture.ids().len()).all(|place| blocks(&fixture.opened(place)).is_some()));
}

#[test]
fn a_drive_is_open_for_writing_unless_it_is_read_only() {
    let mut fixture = fixture();
    for (is_read_only, writable) in [(None, true), (Some(false), true), (Some(true), false)] {
        let drive = api_socket::Drive { is_read_only, ..fixture.drive("a", false) };
        fixture.accept(Request::PutDrive(drive));
        let mut file = fixture.opened(0);
        assert_eq!(file.write(b"x").is_ok(), writable, "{is_read_only:?}");
    }
}

#[test]
fn drives_are_taken_as_often_as_a_start_is_tried() {
    let mut fixture = fixture();
    let drive = fixture.drive("a", true);
    fixture.accept(Request::PutDrive(drive));
    for _ in 0..2 {
        assert_eq!(content(&fixture.opened(0)), "a");
    }
}

#[test]
fn after_the_start_no_file_stays_open_and_the_configuration_is_still_told() {
    let mut fixture = fixture();
    let (source, drive) = (fixture.boot_source(), fixture.drive("a", true));
    let console = Some(fixture.path("console"));
    fixture.accept(Request::PutBootSource(source));
    fixture.accept(Request::PutDrive(drive));
    fixture.accept(Request::PutSerial(api_socket::Serial { serial_out_path: console, rate_limiter: None }));
    let open = |fixture: &Fixture| {
        let names = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| entry.unwrap().path().read_link().ok());
        names.filter(|name| name.starts_with(fixture.dir.path())).count()
    };
    let told = fixture.config.wire();
    assert_eq!(open(&fixture), 3);
    fixture.config.started();
    assert_eq!(open(&fixture), 0);
    assert_eq!(fixture.config.wire(), told);
    assert!(fixture.config.boot().is_err());
    assert!(fixture.config.drives().is_err());
}

#[test]
fn the_root_device_is_the_first_whenever_it_comes() {
    let mut fixture = fixture();
    for (id, root) in [("a", false), ("b", true), ("c", false)] {
        let drive = fixture.drive(id, root);
        fixture.accept(Request::PutDrive(drive));
    }
    assert_eq!(fixture.ids(), ["b", "a", "c"]);
}

#[test]
fn there_is_one_root_device() {
    let mut fixture = fixture();
    let (root, other) = (fixture.drive("a", true), fixture.drive("b", true));
    fixture.accept(Request::PutDrive(root));
    fixture.refuse(Request::PutDrive(other.clone()), &["`is_root_device`", "\"a\"", "\"b\""]);
    let data = fixture.drive("b", false);
    fixture.accept(Request::PutDrive(data));
    fixture.refuse(Request::PutDrive(other.clone()), &["`is_root_device`"]);
    let no_root = fixture.drive("a", false);
    fixture.accept(Request::PutDrive(no_root));
    fixture.accept(Request::PutDrive(other));
    assert_eq!(fixture.ids(), ["b", "a"]);
}

#[test]
fn a_drive_that_is_given_again_is_replaced_in_its_place() {
    let mut fixture = fixture();
    for id in ["a", "b", "c"] {
        let drive = fixture.drive(id, false);
        fixture.accept(Request::PutDrive(drive));
    }
    let again = api_socket::Drive { path_on_host: Some(fixture.file("new")), ..fixture.drive("b", false) };
    fixture.accept(Request::PutDrive(again));
    assert_eq!(fixture.ids(), ["a", "b", "c"]);
    assert_eq!(content(&fixture.opened(1)), "new");
    let root = fixture.drive("c", true);
    fixture.accept(Request::PutDrive(root));
    assert_eq!(fixture.ids(), ["c", "a", "b"]);
}

#[test]
fn a_drive_that_cannot_be_opened_is_named_and_the_one_before_stays() {
    let mut fixture = fixture();
    let drive = fixture.drive("a", false);
    fixture.accept(Request::PutDrive(drive));
    let pipe = fixture.path("pipe");
    make_fifo(&pipe);
    let at = |fixture: &Fixture, path: Option<PathBuf>, is_read_only| {
        Request::PutDrive(api_socket::Drive { path_on_host: path, is_read_only, ..fixture.drive("a", false) })
    };
    let directory = fixture.dir.path().to_path_buf();
    for (path, read_only, word) in [
        (None, false, "not set"),
        (Some(fixture.path("gone")), false, "No such file"),
        (Some(directory.clone()), true, "no file"),
        (Some(directory), false, "cannot be opened"),
        (Some(pipe), true, "no file"),
        (Some("/dev/zero".into()), true, "no file"),
    ] {
        let request = at(&fixture, path, Some(read_only));
        fixture.refuse(request, &["`path_on_host`", word]);
    }
    assert_eq!(content(&fixture.opened(0)), "a");
}

#[test]
fn a_drive_of_another_process_has_no_path_and_only_a_guest_whose_memory_is_shared_gets_one_while_it_runs() {
    let mut fixture = fixture();
    let both = api_socket::Drive { socket: Some("/s".into()), ..fixture.drive("a", false) };
    fixture.refuse(Request::PutDrive(both), &["`socket`", "`path_on_host`"]);
    let gone = api_socket::Drive {
        socket: Some(fixture.path("gone")),
        path_on_host: None,
        ..fixture.drive("a", false)
    };
    fixture.refuse(Request::PutDrive(gone.clone()), &["`socket`", "No such file"]);
    fixture.config.started();
    let text = fixture.config.drive_to_plug(gone.clone()).unwrap_err().message;
    assert!(
        text.contains("`socket`") && text.contains("memory of this guest") && text.contains("2M"),
        "{text}"
    );

    let huge = MachineConfig { mem_size_mib: 128, huge_pages: HugePages::Hugetlbfs2M, ..Default::default() };
    let mut fixture = self::fixture();
    fixture.accept(Request::PutMachineConfig(huge));
    fixture.config.started();
    let text = fixture.config.drive_to_plug(gone).unwrap_err().message;
    assert!(text.contains("No such file"), "its memory can be given away: {text}");
}

#[test]
fn a_drive_of_another_process_and_memory_that_comes_and_goes_do_not_go_together() {
    let mut fixture = fixture();
    fixture.accept(Request::PutMemoryHotplug(plug(1024, 128, 2)));
    assert!(fixture.config.check_shared_memory().is_ok());
    let drive =
        api_socket::Drive { socket: Some("/s".into()), path_on_host: None, ..fixture.drive("a", false) };
    fixture.config.drive_plugged(drive);
    let text = fixture.config.check_shared_memory().unwrap_err().message;
    assert!(
        text.contains("`socket`") && text.contains("\"a\"") && text.contains("/hotplug/memory"),
        "{text}"
    );
}

#[test]
fn a_partuuid_is_one_word_and_for_the_root_device() {
    let mut fixture = fixture();
    let with = |fixture: &Fixture, partuuid: &str, root| {
        let partuuid = Some(partuuid.to_string());
        Request::PutDrive(api_socket::Drive { partuuid, ..fixture.drive("a", root) })
    };
    let long = "x".repeat(MAX_PARTUUID + 1);
    for bad in ["", "a b", "a\nb", "é", "a\"", &long] {
        let request = with(&fixture, bad, true);
        fixture.refuse(request, &["`partuuid`", "letters, digits and hyphens"]);
    }
    let request = with(&fixture, "abc-01", false);
    fixture.refuse(request, &["`partuuid`", "`is_root_device`"]);
    let request = with(&fixture, &long[1..], true);
    fixture.accept(request);
}

#[test]
fn a_device_that_has_no_slot_is_refused_at_once_and_by_its_name() {
    for (identity, room, advice) in [(Identity::Berth, 31, ""), (Identity::Firecracker, 18, "--enable-pci")] {
        let mut fixture = fixture_as(identity);
        let console = |f: &Fixture| {
            Request::PutConsole(api_socket::Console { output_path: f.path("console"), ..Default::default() })
        };
        for number in 2..room {
            let drive = fixture.drive(&format!("d{number}"), false);
            fixture.accept(Request::PutDrive(drive));
        }
        fixture.accept(Request::PutEntropy(Entropy::default()));
        let more = fixture.drive("more", false);
        fixture.accept(Request::PutDrive(more));
        let one_too_many = fixture.drive("last", false);
        let room = format!("room for {room}");
        fixture.refuse(Request::PutDrive(one_too_many), &["`drive_id`", "\"last\"", &room, advice]);
        let interface =
            NetworkInterface { iface_id: "last".into(), host_dev_name: "tap0".into(), ..Default::default() };
        let pmem = Pmem { id: "last".into(), path_on_host: fixture.file("last"), ..Pmem::default() };
        let socket = fixture.path("v.sock");
        let vsock = api_socket::Vsock { guest_cid: 3, uds_path: socket.clone(), ..Default::default() };
        for (request, name) in [
            (Request::PutNetworkInterface(interface), "`iface_id`"),
            (Request::PutPmem(pmem), "`id`"),
            (Request::PutVsock(vsock), "the socket device"),
            (Request::PutBalloon(balloon(1)), "the balloon"),
            (Request::PutMemoryHotplug(plug(1024, 128, 2)), "the memory device"),
            (console(&fixture), "the console"),
        ] {
            fixture.refuse(request, &[name, &room, advice]);
        }
        assert!(!socket.exists(), "who calls would wait for a guest that has no such device");
        // What is there may change.
        let again = fixture.drive("more", false);
        fixture.accept(Request::PutDrive(again));
        fixture.accept(Request::PutEntropy(Entropy::default()));
    }
    let mut fixture = fixture();
    for number in 0..31 {
        let drive = fixture.drive(&format!("d{number}"), false);
        fixture.accept(Request::PutDrive(drive));
    }
    fixture.refuse(Request::PutEntropy(Entropy::default()), &["the entropy device", "room for 31"]);
}

#[test]
fn a_change_of_a_running_guests_drive_is_told() {
    let mut fixture = fixture();
    let limit = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 1 });
    let rate_limiter = Some(RateLimiter { bandwidth: limit(1), ops: limit(2) });
    let drive = api_socket::Drive { rate_limiter, ..fixture.drive("a", false) };
    fixture.accept(Request::PutDrive(drive.clone()));
    // What was left out is told as what it is.
    let (is_read_only, io_engine) = (Some(false), Some(IoEngine::Sync));
    let drive = api_socket::Drive { is_read_only, io_engine, ..drive };
    assert_eq!(fixture.config.wire().drives, std::slice::from_ref(&drive));
    let update =
        |path_on_host, rate_limiter| DriveUpdate { drive_id: "a".to_string(), path_on_host, rate_limiter };

    fixture.config.drive_updated(update(Some("/new".into()), None));
    let moved = api_socket::Drive { path_on_host: Some("/new".into()), ..drive };
    assert_eq!(fixture.config.wire().drives, std::slice::from_ref(&moved));

    fixture.config.drive_updated(update(None, Some(RateLimiter { bandwidth: None, ops: limit(3) })));
    let rate_limiter = Some(RateLimiter { bandwidth: limit(1), ops: limit(3) });
    let limited = api_socket::Drive { rate_limiter, ..moved };
    assert_eq!(fixture.config.wire().drives, [limited]);

    fixture.config.drive_updated(DriveUpdate { drive_id: "b".to_string(), ..Default::default() });
}

#[test]
fn the_entropy_device_and_its_limit_are_told_back() {
    let mut fixture = fixture();
    assert_eq!(fixture.config.wire().entropy, None);
    let ops = Some(TokenBucket { size: 1, one_time_burst: None, refill_time: 2 });
    let entropy = Entropy { rate_limiter: Some(RateLimiter { bandwidth: None, ops }), io_thread: Some(1) };
    fixture.accept(Request::PutEntropy(entropy));
    assert_eq!(fixture.config.entropy, Some(entropy));
    assert_eq!(fixture.config.wire().entropy, Some(entropy));
}

#[test]
fn a_limit_of_the_entropy_device_that_a_change_leaves_out_stays() {
    let mut fixture = fixture();
    let limit = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 1 });
    let limiter = |bandwidth, ops| Some(RateLimiter { bandwidth, ops });
    let update = EntropyUpdate { rate_limiter: limiter(None, limit(5)) };
    let message = fixture.config.update_entropy(update).unwrap_err().message;
    assert!(message.contains("PUT /entropy"), "{message}");
    let entropy = Entropy { rate_limiter: limiter(limit(1), limit(2)), io_thread: Some(1) };
    fixture.accept(Request::PutEntropy(entropy));
    assert_eq!(fixture.config.update_entropy(EntropyUpdate::default()), Ok(None));
    assert_eq!(fixture.config.update_entropy(update), Ok(limiter(limit(1), limit(5))));
    let changed = Entropy { rate_limiter: limiter(limit(1), limit(5)), ..entropy };
    assert_eq!(fixture.config.wire().entropy, Some(changed));
}

#[test]
fn sockets_are_made_at_once_and_replaced_by_those_of_another_request() {
    let mut fixture = fixture();
    let (first, second) = (fixture.path("v.sock"), fixture.path("w.sock"));
    let at = |guest_cid, uds_path: &Path| api_socket::Vsock {
        guest_cid,
        uds_path: uds_path.to_owned(),
        ..Default::default()
    };
    assert!(fixture.config.vsock().unwrap().is_none());
    fixture.accept(Request::PutVsock(at(3, &first)));
    UnixStream::connect(&first).unwrap();
    // The same path: the socket that somebody may wait at stays.
    fixture.accept(Request::PutVsock(at(4, &first)));
    assert_eq!(fixture.config.vsock().unwrap().unwrap().config.guest_cid, 4);
    UnixStream::connect(&first).unwrap();

    fixture.file("w.sock");
    fixture.refuse(Request::PutVsock(at(4, &second)), &["`uds_path`", "w.sock", "Remove the file"]);
    fixture.refuse(Request::PutVsock(at(4, &fixture.path("no/v"))), &["`uds_path`", "no/v", "exists"]);
    let long = fixture.path(&"v".repeat(108));
    fixture.refuse(Request::PutVsock(at(4, &long)), &["`uds_path`", "shorter", "107"]);
    for (cid, path) in [(2, &first), (0, &second), (u32::MAX, &first)] {
        fixture.refuse(Request::PutVsock(at(cid, path)), &["`guest_cid`", &cid.to_string(), "from 3 to"]);
    }
    UnixStream::connect(&first).unwrap();

    std::fs::remove_file(&second).unwrap();
    fixture.accept(Request::PutVsock(at(5, &second)));
    UnixStream::connect(&second).unwrap();
    assert!(!first.exists());
    assert_eq!(fixture.config.wire().vsock, Some(at(5, &second)));
    fixture.config.started();
    assert!(fixture.config.vsock().is_err());
    assert_eq!(fixture.config.wire().vsock, Some(at(5, &second)));
}

#[test]
fn the_serial_port_writes_to_its_file() {
    let mut fixture = fixture();
    let path = fixture.path("console");
    let serial = api_socket::Serial { serial_out_path: Some(path.clone()), rate_limiter: None };
    fixture.accept(Request::PutSerial(serial));
    for text in ["first ", "second"] {
        fixture.config.serial_output().unwrap().write_all(text.as_bytes()).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), "first second");
}

#[test]
fn console_output_beyond_its_limit_is_dropped_and_counted() {
    let mut fixture = fixture();
    let path = fixture.path("console");
    // An hour: nothing comes back while this runs.
    let rate_limiter = Some(TokenBucket { size: 3, one_time_burst: Some(2), refill_time: 3_600_000 });
    let serial = api_socket::Serial { serial_out_path: Some(path.clone()), rate_limiter };
    fixture.accept(Request::PutSerial(serial));
    let dropped = fixture.config.serial_dropped();
    let mut output = fixture.config.serial_output().unwrap();
    for byte in b"abcdefgh" {
        assert_eq!(output.write(&[*byte]).unwrap(), 1);
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), "abcde");
    assert_eq!(dropped.load(Ordering::Relaxed), 3);
}

#[test]
fn a_serial_output_that_cannot_be_opened_is_named_and_the_one_before_stays() {
    let mut fixture = fixture();
    let path = fixture.path("console");
    let at = |path: PathBuf| {
        Request::PutSerial(api_socket::Serial { serial_out_path: Some(path), rate_limiter: None })
    };
    fixture.accept(at(path.clone()));
    let wrong = fixture.path("no/console");
    fixture.refuse(at(wrong), &["`serial_out_path`", "no/console"]);
    fixture.config.serial_output().unwrap().write_all(b"here").unwrap();
    assert_eq!(std::fs::read_to_string(path).unwrap(), "here");
}

#[test]
fn every_field_of_the_console_arrives_and_is_told_back() {
    let mut fixture = fixture();
    assert_eq!(fixture.config.wire().console, None);
    let (input, output) = (fixture.path("in"), fixture.path("out"));
    make_fifo(&input);
    let console = api_socket::Console {
        output_path: output.clone(),
        input_path: Some(input.clone()),
        columns: 132,
        rows: 43,
        rate_limiter: Some(RateLimiter { bandwidth: Some(bucket(1)), ops: Some(bucket(2)) }),
        io_thread: Some(2),
        ports: Vec::new(),
    };
    fixture.accept(Request::PutConsole(console.clone()));
    assert_eq!(fixture.config.wire().console, Some(console.clone()));

    let open = fixture.config.console.as_ref().unwrap();
    assert_eq!(open.settings, console);
    open.ends.output.try_clone().unwrap().write_all(b"said").unwrap();
    assert_eq!(std::fs::read_to_string(output).unwrap(), "said");
    // The pipe is open for reading: a writer finds its reader and does not wait.
    File::options().write(true).open(input).unwrap().write_all(b"typed").unwrap();
    let mut typed = [0; 5];
    open.ends.input.as_ref().unwrap().read_exact(&mut typed).unwrap();
    assert_eq!(&typed, b"typed");

    fixture.config.started();
    assert_eq!(fixture.config.wire().console, Some(console));
}

#[test]
fn a_console_that_cannot_be_opened_is_named_and_the_one_before_stays() {
    let mut fixture = fixture();
    let output = fixture.path("out");
    let console = |output_path, input_path| {
        Request::PutConsole(api_socket::Console { output_path, input_path, ..Default::default() })
    };
    fixture.accept(console(output.clone(), None));
    let wrong = fixture.path("no/out");
    fixture.refuse(console(wrong, None), &["`output_path`", "no/out", "cannot be written"]);
    let (file, gone, directory) =
        (fixture.file("file"), fixture.path("gone"), fixture.dir.path().to_path_buf());
    for (input, word) in [(file, "nobody can type"), (gone, "No such file"), (directory, "cannot be opened")]
    {
        fixture.refuse(console(output.clone(), Some(input)), &["`input_path`", word, "named pipe"]);
    }
    assert_eq!(fixture.config.console.unwrap().settings.output_path, output);
}

fn bucket(size: u64) -> api_socket::TokenBucket {
    api_socket::TokenBucket { size, one_time_burst: None, refill_time: 1000 }
}

fn console_of(fixture: &Fixture, ports: Vec<ConsolePort>) -> api_socket::Console {
    api_socket::Console {
        output_path: fixture.path("out"),
        columns: 80,
        rows: 25,
        ports,
        ..Default::default()
    }
}

fn port(fixture: &Fixture, name: &str) -> ConsolePort {
    ConsolePort { name: name.to_string(), output_path: fixture.path("port"), ..ConsolePort::default() }
}

#[test]
fn every_port_of_the_console_is_opened_and_told_back() {
    let mut fixture = fixture();
    let input = fixture.path("in");
    make_fifo(&input);
    let ports = vec![
        ConsolePort { is_console: true, columns: Some(1), rows: Some(2), ..port(&fixture, "second") },
        ConsolePort {
            input_path: Some(input),
            rate_limiter: Some(RateLimiter { bandwidth: Some(bucket(3)), ops: None }),
            ..port(&fixture, "org.test.stream-1_0")
        },
    ];
    let settings = console_of(&fixture, ports);
    fixture.accept(Request::PutConsole(settings.clone()));
    assert_eq!(fixture.config.wire().console, Some(settings.clone()));
    let open = fixture.config.console.as_ref().unwrap();
    assert_eq!(open.ports.iter().map(|port| port.input.is_some()).collect::<Vec<_>>(), [false, true]);
    open.ports[1].output.try_clone().unwrap().write_all(b"said").unwrap();
    assert_eq!(std::fs::read_to_string(fixture.path("port")).unwrap(), "said");
    let sizes: Vec<_> = settings.ports.iter().map(super::console::size).collect();
    assert_eq!(sizes, [Some(devices::virtio::console::Size { columns: 1, rows: 2 }), None]);
}

#[test]
fn a_port_that_the_guest_could_not_find_or_use_is_refused() {
    let mut fixture = fixture();
    let before = console_of(&fixture, vec![port(&fixture, "kept")]);
    fixture.accept(Request::PutConsole(before));
    let long = "n".repeat(64);
    for name in ["", "a/b", "two words", "..", ".", "\n", "\u{e9}", &long] {
        let ports = vec![port(&fixture, name)];
        fixture.refuse(Request::PutConsole(console_of(&fixture, ports)), &["`name`", "1 to 63"]);
    }
    let twice = vec![port(&fixture, "a"), port(&fixture, "b"), port(&fixture, "a")];
    fixture.refuse(Request::PutConsole(console_of(&fixture, twice)), &["`name` is \"a\" twice"]);
    let sized = vec![ConsolePort { rows: Some(25), ..port(&fixture, "a") }];
    fixture.refuse(Request::PutConsole(console_of(&fixture, sized)), &["`rows`", "\"a\"", "`is_console`"]);
    let lost = ConsolePort { output_path: fixture.path("no/out"), ..port(&fixture, "a") };
    fixture.refuse(Request::PutConsole(console_of(&fixture, vec![lost])), &["`output_path`", "no/out"]);
    let typed = ConsolePort { input_path: Some(fixture.file("file")), ..port(&fixture, "a") };
    fixture
        .refuse(Request::PutConsole(console_of(&fixture, vec![typed])), &["`input_path`", "nobody can type"]);
    let many = |count: usize| (0..count).map(|number| port(&fixture, &number.to_string())).collect();
    let (most, more) = (console_of(&fixture, many(15)), console_of(&fixture, many(16)));
    fixture.refuse(Request::PutConsole(more), &["`ports` has 16", "at most 15"]);
    fixture.accept(Request::PutConsole(most));
}

#[test]
fn a_terminal_among_the_ports_is_resized_by_its_name() {
    let mut fixture = fixture();
    let resize = |port: Option<&str>| ConsoleUpdate::size(7, 8, port.map(String::from));
    let message = fixture.config.update_console(&resize(None)).unwrap_err().message;
    assert!(message.contains("PUT /console"), "{message}");
    let terminal = ConsolePort { is_console: true, ..port(&fixture, "terminal") };
    let settings = console_of(&fixture, vec![port(&fixture, "stream"), terminal]);
    fixture.accept(Request::PutConsole(settings));
    let size = Some(Size { columns: 7, rows: 8 });
    for (name, port) in [(None, 0), (Some("terminal"), 2)] {
        let changed = fixture.config.update_console(&resize(name));
        assert_eq!(changed, Ok(Change { port, size, limits: None }));
    }
    for (name, words) in [("stream", "no terminal"), ("other", "no such port")] {
        let message = fixture.config.update_console(&resize(Some(name))).unwrap_err().message;
        assert!(message.contains("`port` is") && message.contains(words), "{message}");
    }
    let one = ConsoleUpdate { rows: Some(9), ..ConsoleUpdate::default() };
    let changed = fixture.config.update_console(&one).unwrap();
    assert_eq!(changed.size, Some(Size { columns: 7, rows: 9 }), "the other stays");
    let told = fixture.config.wire().console.unwrap();
    assert_eq!((told.columns, told.rows), (7, 9));
    assert_eq!((told.ports[1].columns, told.ports[1].rows), (Some(7), Some(8)));
    assert_eq!(told.ports[0].columns, None);
}

#[test]
fn a_limit_of_a_console_s_port_that_a_change_leaves_out_stays() {
    let mut fixture = fixture();
    let limit = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 1 });
    let limiter = |bandwidth, ops| Some(RateLimiter { bandwidth, ops });
    let stream = ConsolePort { rate_limiter: limiter(limit(1), limit(2)), ..port(&fixture, "stream") };
    fixture.accept(Request::PutConsole(console_of(&fixture, vec![stream])));
    let update = |port: Option<&str>| ConsoleUpdate {
        rate_limiter: limiter(None, limit(5)),
        port: port.map(String::from),
        ..ConsoleUpdate::default()
    };
    for (name, port, limits) in
        [(Some("stream"), 1, limiter(limit(1), limit(5))), (None, 0, limiter(None, limit(5)))]
    {
        let changed = fixture.config.update_console(&update(name));
        assert_eq!(changed, Ok(Change { port, size: None, limits }));
    }
    let nothing = fixture.config.update_console(&ConsoleUpdate::default());
    assert_eq!(nothing, Ok(Change { port: 0, size: None, limits: None }));
    let told = fixture.config.wire().console.unwrap();
    assert_eq!(told.rate_limiter, limiter(None, limit(5)));
    assert_eq!(told.ports[0].rate_limiter, limiter(limit(1), limit(5)));
}

#[test]
fn the_cpu_configuration_is_taken_as_it_is() {
    let mut fixture = fixture();
    let text = r#"{"kvm_capabilities":["!56"],"msr_modifiers":[{"addr":"0x10a","bitmap":"0b1x"}]}"#;
    let cpu: CpuConfig = serde_json::from_str(text).unwrap();
    fixture.accept(Request::PutCpuConfig(cpu.clone()));
    assert_eq!(fixture.config.cpu, cpu);
    assert_eq!(fixture.config.wire().cpu_config, None, "Firecracker does not tell it either");
}

#[test]
fn the_whole_configuration_can_be_had_before_anything_is_set() {
    let mut fixture = fixture();
    let expected = VmConfig { machine_config: Some(MachineConfig::default()), ..VmConfig::default() };
    assert_eq!(fixture.config.apply(Request::GetVmConfig), Ok(Reply::VmConfig(Box::new(expected))));
}

#[test]
fn a_configuration_that_is_told_can_be_given_again() {
    let mut fixture = fixture();
    let (source, drive) = (fixture.boot_source(), fixture.drive("a", true));
    for request in [
        Request::PutMachineConfig(MachineConfig { vcpu_count: 2, ..machine() }),
        Request::PutBootSource(source),
        Request::PutDrive(drive),
        Request::PutEntropy(Entropy::default()),
    ] {
        fixture.accept(request);
    }
    let told = fixture.config.wire();
    let mut again = Config::new(Identity::Berth, true, MMDS_LIMIT, Handed::default()).unwrap();
    for request in api_socket::config_file::requests(told.clone()).unwrap() {
        assert_eq!(again.apply(request), Ok(Reply::Empty));
    }
    assert_eq!(again.wire(), told);
}

#[test]
fn io_threads_are_those_that_devices_name_and_the_first() {
    let mut fixture = fixture();
    let there = |fixture: &Fixture| fixture.config.io_threads().into_iter().collect::<Vec<_>>();
    assert_eq!(there(&fixture), [0]);
    let pmem = || Pmem { id: "p".into(), path_on_host: "/p".into(), ..Pmem::default() };
    let on = |fixture: &Fixture, io_thread: Option<u8>| {
        [
            Request::PutDrive(api_socket::Drive { io_thread, ..fixture.drive("d", false) }),
            Request::PutPmem(Pmem { io_thread, path_on_host: fixture.file("p"), ..pmem() }),
            Request::PutVsock(api_socket::Vsock {
                io_thread,
                guest_cid: 3,
                uds_path: fixture.path("v.sock"),
                ..Default::default()
            }),
            Request::PutBalloon(Balloon { io_thread, ..balloon(1) }),
            Request::PutMemoryHotplug(MemoryHotplugConfig { io_thread, ..plug(1024, 128, 2) }),
            Request::PutEntropy(Entropy { io_thread, ..Entropy::default() }),
            Request::PutConsole(api_socket::Console {
                io_thread,
                output_path: fixture.path("out"),
                ..Default::default()
            }),
        ]
    };
    for (number, request) in (1..).zip(on(&fixture, None)) {
        fixture.accept(request);
        assert_eq!(there(&fixture), [0], "{number}");
    }
    for number in [7, 15] {
        for request in on(&fixture, Some(number)) {
            fixture.accept(request);
            assert!(there(&fixture).contains(&number));
        }
        assert_eq!(there(&fixture), [0, number]);
    }
    for request in on(&fixture, Some(16)) {
        fixture.refuse(request, &["`io_thread` is 16", "from 0 to 15"]);
    }
    assert_eq!(fixture.config.vsock().unwrap().unwrap().io_thread, Some(15));

    fixture.config.started();
    let drive = api_socket::Drive { io_thread: Some(16), ..fixture.drive("e", false) };
    let pmem = Pmem { id: "q".into(), io_thread: Some(16), path_on_host: fixture.file("q"), ..pmem() };
    for refused in [fixture.config.drive_to_plug(drive).err(), fixture.config.pmem_to_plug(pmem).err()] {
        assert!(refused.is_some_and(|fault| fault.message.contains("`io_thread` is 16")));
    }
}

#[test]
fn what_is_not_about_the_configuration_is_given_back() {
    let mut fixture = fixture();
    for request in [
        Request::GetInstanceInfo,
        Request::GetVersion,
        Request::PutLogger(api_socket::Logger { level: Some(LogLevel::Off), ..Default::default() }),
        Request::PutMetrics(api_socket::Metrics::default()),
        Request::Action(api_socket::ActionType::InstanceStart),
        Request::PatchVm(VmState::Paused),
        Request::PatchDrive(DriveUpdate::default()),
        Request::DeleteDrive("a".to_string()),
    ] {
        assert_eq!(fixture.config.apply(request.clone()), Err(request));
    }
}

#[test]
fn what_was_handed_over_is_looked_at_like_the_file_of_a_path() {
    let mut f = fixture();
    let take = |file: File| std::os::fd::IntoRawFd::into_raw_fd(file);
    let image = take(File::open(f.file("image")).unwrap());
    let directory = take(File::open(f.dir.path()).unwrap());
    let named = [("image".to_string(), image), ("directory".to_string(), directory)];
    f.config = Config::new(Identity::Berth, true, MMDS_LIMIT, Handed::take(&named).unwrap()).unwrap();

    let drive = |path: &str, read_only| {
        let (path_on_host, is_read_only) = (Some(path.into()), Some(read_only));
        Request::PutDrive(api_socket::Drive {
            drive_id: "disk".into(),
            path_on_host,
            is_read_only,
            ..Default::default()
        })
    };
    f.refuse(drive("fd:image", false), &["`path_on_host` is fd:image", "is_read_only"]);
    f.refuse(drive("fd:directory", true), &["`path_on_host` is fd:directory", "no file"]);
    f.refuse(drive("fd:none", true), &["`path_on_host` is fd:none", "image, directory"]);
    f.accept(drive("fd:image", true));
    assert_eq!(f.config.wire().drives[0].path_on_host.as_deref(), Some(Path::new("fd:image")));

    let boot = |kernel: &str| {
        Request::PutBootSource(BootSource { kernel_image_path: kernel.into(), ..Default::default() })
    };
    f.refuse(boot("fd:directory"), &["`kernel_image_path` is fd:directory", "no file"]);
    f.accept(boot("fd:image"));
    assert!(f.config.open_drive(Path::new("fd:image"), true).is_ok());
}

fn balloon(amount_mib: u32) -> Balloon {
    Balloon { amount_mib, deflate_on_oom: true, ..Balloon::default() }
}

#[test]
fn a_balloon_has_at_most_what_the_guest_has() {
    let mut fixture = fixture();
    let none = fixture.config.apply(Request::GetBalloon);
    assert!(matches!(none, Ok(Reply::Fault(fault)) if fault.message.contains("PUT /balloon")));
    fixture.refuse(Request::PutBalloon(balloon(129)), &["amount_mib", "129", "at most 128"]);
    fixture.accept(Request::PutBalloon(balloon(128)));
    let machine = |mem_size_mib| MachineConfig { mem_size_mib, ..MachineConfig::default() };
    fixture.refuse(
        Request::PutMachineConfig(machine(127)),
        &["mem_size_mib", "127", "amount_mib", "at least 128"],
    );
    let huge = machine(1 << 26);
    fixture.accept(Request::PutMachineConfig(huge));
    fixture.refuse(Request::PutBalloon(balloon(u32::MAX)), &["amount_mib", "at most 16777215"]);
    assert_eq!(fixture.config.apply(Request::GetBalloon), Ok(Reply::Balloon(balloon(128))));
    assert_eq!(fixture.config.wire().balloon, Some(balloon(128)));
}

#[test]
fn a_running_balloon_changes_in_size_but_not_in_what_it_can_do() {
    let mut fixture = fixture();
    let size = |amount_mib| BalloonUpdate { amount_mib };
    let interval = |stats_polling_interval_s| BalloonStatsUpdate { stats_polling_interval_s };
    assert!(fixture.config.update_balloon(size(1)).is_err());
    assert!(fixture.config.update_balloon_stats(interval(0)).is_err());
    fixture.accept(Request::PutBalloon(balloon(0)));
    fixture.config.update_balloon(size(100)).unwrap();
    let fault = fixture.config.update_balloon(size(200)).unwrap_err();
    assert!(fault.message.contains("amount_mib") && fault.message.contains("200"), "{fault}");
    fixture.config.update_balloon_stats(interval(0)).unwrap();
    let fault = fixture.config.update_balloon_stats(interval(1)).unwrap_err();
    assert!(fault.message.contains("cannot be switched on"), "{fault}");
    let with = Balloon { stats_polling_interval_s: 1, ..balloon(0) };
    fixture.accept(Request::PutBalloon(with));
    fixture.config.update_balloon_stats(interval(7)).unwrap();
    let fault = fixture.config.update_balloon_stats(interval(0)).unwrap_err();
    assert!(fault.message.contains("cannot be switched off"), "{fault}");
    assert_eq!(fixture.config.wire().balloon.unwrap().stats_polling_interval_s, 7);
}

#[test]
fn the_metadata_service_and_the_kernels_back_end_are_not_on_one_interface() {
    let mut fixture = fixture();
    let interface = |id: &str, vhost| NetworkInterface {
        iface_id: id.into(),
        host_dev_name: "tap0".into(),
        vhost,
        ..NetworkInterface::default()
    };
    fixture.config.interfaces.plugged(interface("plain", None));
    fixture.config.interfaces.plugged(interface("fast", Some(true)));
    let mmds = |ids: &[&str]| {
        let ids: Vec<_> = ids.iter().map(|id| format!("{id:?}")).collect();
        let text = format!(r#"{{"version": "V2", "network_interfaces": [{}]}}"#, ids.join(","));
        Request::PutMmdsConfig(serde_json::from_str(&text).unwrap())
    };
    let words = ["`vhost` is true", "\"fast\"", "`network_interfaces` of /mmds/config"];
    fixture.refuse(mmds(&["plain", "fast"]), &words);
    fixture.accept(mmds(&["plain"]));
    let words = ["`vhost` is true", "\"plain\"", "`network_interfaces` of /mmds/config"];
    fixture.refuse(Request::PutNetworkInterface(interface("plain", Some(true))), &words);
}

fn plug(total_size_mib: u64, slot_size_mib: u64, block_size_mib: u64) -> MemoryHotplugConfig {
    MemoryHotplugConfig { total_size_mib, slot_size_mib, block_size_mib, io_thread: None }
}

#[test]
fn memory_that_comes_and_goes_is_whole_slots_of_whole_blocks() {
    let mut fixture = fixture();
    assert!(fixture.config.memory_hotplug().unwrap_err().message.contains("PUT /hotplug/memory"));
    for (bad, field, value) in [
        (plug(1024, 128, 0), "block_size_mib", "0"),
        (plug(1024, 128, 1), "block_size_mib", "1"),
        (plug(1024, 128, 3), "block_size_mib", "3"),
        (plug(1024, 128, u64::MAX), "block_size_mib", "18446744073709551615"),
        (plug(1024, 64, 2), "slot_size_mib", "64"),
        (plug(1024, 130, 4), "slot_size_mib", "130"),
        (plug(1024, 128, 256), "slot_size_mib", "128"),
        (plug(0, 128, 2), "total_size_mib", "0"),
        (plug(64, 128, 2), "total_size_mib", "64"),
        (plug(1000, 128, 2), "total_size_mib", "1000"),
        (plug(128 * (1 << 40), 128, 2), "total_size_mib", "larger `block_size_mib`"),
        (plug(128 * 16385, 128, 2), "total_size_mib", "larger `slot_size_mib`"),
        (plug(1 << 63, 1 << 62, 1 << 62), "total_size_mib", "no guest"),
    ] {
        fixture.refuse(Request::PutMemoryHotplug(bad), &[field, value]);
    }
    assert_eq!(fixture.config.wire().memory_hotplug, None);
    fixture.accept(Request::PutMemoryHotplug(plug(128 * 16384, 128, 2)));
    fixture.accept(Request::PutMemoryHotplug(plug(960, 192, 64)));
    assert_eq!(fixture.config.wire().memory_hotplug, Some(plug(960, 192, 64)));
}

#[test]
fn no_more_can_be_asked_for_than_there_is_and_only_whole_blocks() {
    let memory = memory_hotplug::MemoryHotplug::new(plug(1024, 128, 8)).unwrap();
    for mib in [0, 8, 512, 1024] {
        assert_eq!(memory.check_requested(mib).unwrap().mib(), mib);
    }
    for mib in [1, 4, 12, 1023, 1032, 1 << 44, u64::MAX] {
        let message = memory.check_requested(mib).unwrap_err().message;
        for word in ["requested_size_mib", &mib.to_string(), "1024", "multiple of 8"] {
            assert!(message.contains(word), "{word} is not in: {message}");
        }
    }
}

fn qcow2_image(f: &Fixture, name: &str, backing: Option<&str>) -> PathBuf {
    let path = f.path(name);
    let blank = devices::backend::qcow2::testing::Blank { cluster_bits: 16, size: 1 << 20, backing };
    std::fs::write(&path, blank.bytes()).unwrap();
    path
}

#[test]
fn a_qcow2_drive_has_the_images_behind_it_that_are_listed_and_no_others() {
    let mut f = fixture();
    let base = f.file("base");
    let image = qcow2_image(&f, "image", Some("/etc/passwd"));
    let plain = qcow2_image(&f, "plain", None);
    let behind = BackingFile { path_on_host: base.clone(), format: DiskFormat::Raw };
    let drive = |path: &PathBuf, backing: &[&BackingFile]| api_socket::Drive {
        drive_id: "a".into(),
        path_on_host: Some(path.clone()),
        format: Some(DiskFormat::Qcow2),
        backing: backing.iter().map(|backing| (*backing).clone()).collect(),
        ..Default::default()
    };
    let put = |drive: &api_socket::Drive| Request::PutDrive(drive.clone());
    f.refuse(put(&drive(&image, &[])), &["`path_on_host` is", "image", "`backing` lists none"]);
    f.refuse(
        put(&drive(&plain, &[&behind])),
        &["`path_on_host` of `backing[0]` is", "base", "no backing file"],
    );
    let two = drive(&image, &[&behind, &behind]);
    f.refuse(put(&two), &["`path_on_host` of `backing[1]` is"]);
    let missing = BackingFile { path_on_host: "/nowhere".into(), ..behind.clone() };
    f.refuse(
        put(&drive(&image, &[&missing])),
        &["`path_on_host` of `backing[0]` is /nowhere", "cannot be opened"],
    );
    let as_qcow2 = BackingFile { format: DiskFormat::Qcow2, ..behind.clone() };
    f.refuse(put(&drive(&image, &[&as_qcow2])), &["`path_on_host` of `backing[0]` is", "no qcow2 image"]);
    let many = vec![&as_qcow2; 16];
    f.refuse(put(&drive(&image, &many)), &["`backing` lists 16 images", "at most 15"]);
    f.refuse(put(&drive(&base, &[])), &["`path_on_host` is", "no qcow2 image", "`format`"]);
    let raw = api_socket::Drive { format: None, ..drive(&image, &[&behind]) };
    f.refuse(put(&raw), &["`backing` is set and `format` is Raw"]);
    let ring = api_socket::Drive { io_engine: Some(IoEngine::Async), ..drive(&plain, &[]) };
    f.refuse(put(&ring), &["`io_engine` is Async and `format` is Qcow2"]);
    let direct = api_socket::Drive { direct: Some(true), ..drive(&plain, &[]) };
    f.refuse(put(&direct), &["`direct` is true and `format` is Qcow2"]);

    let good = drive(&image, &[&behind]);
    f.accept(put(&good));
    let told = f.config.wire().drives.remove(0);
    assert_eq!((told.format, &told.backing), (good.format, &good.backing));
    assert_eq!(f.files(0).backing.len(), 1);
    // What another image is replaced by, on the same ones.
    assert!(f.config.open_in_place(&good, &image).is_ok());
    let fault = f.config.open_in_place(&good, &plain).unwrap_err();
    assert!(fault.message.contains("no backing file"), "{fault}");
    let names = f.config.reach().names();
    assert_eq!(names, [f.dir.path().display().to_string()]);
}

#[test]
fn a_drive_without_a_format_is_told_without_one() {
    let f = fixture();
    let text = serde_json::to_string(&f.drive("a", false)).unwrap();
    assert!(!text.contains("format") && !text.contains("backing"), "{text}");
}

#[test]
fn what_a_running_guest_is_given_may_lie_in_the_directory_that_was_named() {
    let mut f = fixture();
    let file = f.file("file");
    for path in [&file, Path::new("/nowhere")] {
        let fault = f.config.set_hot_plug_directory(path).unwrap_err();
        assert!(fault.message.contains(&format!("`hot-plug-directory` is {}", path.display())), "{fault}");
    }
    assert!(f.config.reach().names().is_empty());
    f.config.set_hot_plug_directory(f.dir.path()).unwrap();
    assert_eq!(f.config.reach().names(), [f.dir.path().display().to_string()]);
}
