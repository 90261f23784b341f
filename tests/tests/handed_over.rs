//! Files that the jailer hands over as open descriptors: a stock guest boots from them in a cell that has none of them, and
//! its VMM can open none of them.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use api_socket::{ActionType, Client, Drive, DriveUpdate, NetworkInterface, Request};
use berth_tests::cell::{Cells, Vmm, output, set, tree, was_refused};
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{Console, Ended, Kernel, Setup, asset, blank_disk, limits};
use berth_tests::host::{process, provide};
use tempfile::TempDir;

const DISK: u64 = 1 << 20;

/// Images where the VMM's user cannot come.
struct Images(TempDir);

impl Images {
    fn new() -> Images {
        let images = Images(tempfile::tempdir().unwrap());
        fs::copy(asset(provide::VMLINUX), images.path("kernel")).unwrap();
        fs::copy(asset(provide::INITRAMFS), images.path("initrd")).unwrap();
        for disk in ["data", "seed"] {
            blank_disk(images.path(disk), DISK);
        }
        fs::write(images.path("seed"), [b"a seed\n".as_slice(), &[0; 505]].concat()).unwrap();
        for file in tree(images.0.path()) {
            fs::set_permissions(images.path(&file), fs::Permissions::from_mode(0o600)).unwrap();
        }
        images
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn flag(&self, name: &str, ending: &str) -> String {
        format!("--file={name}={}{ending}", self.path(name).display())
    }
}

/// All that the guest needs is handed over, and its second drive is read-only.
fn boot(cells: &Cells, vmm: &mut Vmm) -> (Client, Console) {
    let mut console = vmm.console();
    let mut api = cells.client();
    let drive = |name: &str, is_read_only| Drive {
        is_read_only: Some(is_read_only),
        ..disk_drive(name, format!("fd:{name}").into())
    };
    let setup = Setup {
        kernel: Kernel::Path("fd:kernel".into()),
        drives: vec![drive("data", false), drive("seed", true)],
        ..Setup::default()
    };
    for mut request in setup.requests() {
        if let Request::PutBootSource(boot) = &mut request {
            boot.initrd_path = Some("fd:initrd".into());
        }
        api.apply(&request).unwrap();
    }
    api.apply(&Request::Action(ActionType::InstanceStart)).unwrap();
    console.wait_for("# ", limits::BOOT);
    (api, console)
}

#[track_caller]
fn shell(console: &mut Console, command: &str) -> (String, i32) {
    let output = console.shell(command, limits::COMMAND);
    (output.text, output.code)
}

#[test]
fn a_guest_boots_and_keeps_its_data_on_files_that_are_not_in_its_cell() {
    let (cells, images) = (Cells::new(), Images::new());
    let flags = [
        images.flag("kernel", ":ro"),
        images.flag("initrd", ":ro"),
        images.flag("data", ""),
        images.flag("seed", ":ro"),
    ];
    let mut vmm = cells.start(&flags.each_ref().map(String::as_str));
    let (mut api, mut console) = boot(&cells, &mut vmm);

    assert_eq!(shell(&mut console, "head -n 1 /dev/vdb"), ("a seed\n".into(), 0));
    assert_ne!(shell(&mut console, "echo x | dd of=/dev/vdb conv=fsync").1, 0);
    assert_eq!(shell(&mut console, "printf kept | dd of=/dev/vda seek=1 conv=fsync 2>/dev/null").1, 0);

    // The same name again is the same file, which has grown.
    File::options().write(true).open(images.path("data")).unwrap().set_len(2 * DISK).unwrap();
    let update = DriveUpdate {
        drive_id: "data".into(),
        path_on_host: Some("fd:data".into()),
        ..DriveUpdate::default()
    };
    api.apply(&Request::PatchDrive(update)).unwrap();
    assert_eq!(shell(&mut console, "cat /sys/block/vda/size"), (format!("{}\n", 2 * DISK / 512), 0));

    let names = tree(&cells.root());
    assert!(names.is_disjoint(&set(&["kernel", "initrd", "data", "seed"])), "{names:?}");
    console.send(b"poweroff -f\n");
    assert_eq!(vmm.ended(), Ended::Code(0));
    let mut kept = [0; 4];
    File::open(images.path("data")).unwrap().read_exact_at(&mut kept, 512).unwrap();
    assert_eq!(&kept, b"kept");
}

#[test]
fn descriptors_of_the_callers_are_handed_on_and_no_others() {
    let (cells, images) = (Cells::new(), Images::new());
    let mut data = File::options().read(true).write(true).open(images.path("data")).unwrap();
    let open = |name: &str| process::passable(File::open(images.path(name)).unwrap()).unwrap();
    let handed = [open("kernel"), open("initrd"), process::passable(&data).unwrap(), open("seed")];
    let stray = open("seed");
    let numbers = [&handed[0], &handed[1], &handed[2], &handed[3]].map(process::number);
    let stray_number = process::number(&stray);
    // A file without a name.
    fs::remove_file(images.path("data")).unwrap();

    let flags: Vec<_> = ["kernel", "initrd", "data", "seed"]
        .iter()
        .zip(&numbers)
        .map(|(name, number)| format!("--fd={name}={number}"))
        .collect();
    let mut command = cells.jailer(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let passed = handed.into_iter().chain([stray]).collect();
    let mut vmm = Vmm { child: process::spawn_bound(&mut command, passed).unwrap() };
    let (_api, mut console) = boot(&cells, &mut vmm);
    assert_eq!(shell(&mut console, "printf kept | dd of=/dev/vda conv=fsync 2>/dev/null").1, 0);

    let target = |number: &str| fs::read_link(format!("/proc/{}/fd/{number}", vmm.pid()));
    for number in &numbers {
        assert!(target(number).unwrap().starts_with(images.0.path()));
    }
    // The VMM may have opened something under that number since.
    assert!(!target(&stray_number).is_ok_and(|target| target.starts_with(images.0.path())));
    drop(vmm);
    cells.kill();
    let mut kept = String::new();
    data.rewind().unwrap();
    Read::by_ref(&mut data).take(4).read_to_string(&mut kept).unwrap();
    assert_eq!(kept, "kept");
}

/// Opens the queues of a tap by its name, so many, as descriptors from 50 on, and becomes the command that follows. Python has
/// a call for it, where Rust would need code of its own.
const WITH_TAP: &str = "\
import fcntl, os, struct, sys
for number in range(int(sys.argv[2])):
    queue = os.open('/dev/net/tun', os.O_RDWR)
    # TUNSETIFF with IFF_TAP, IFF_NO_PI, IFF_VNET_HDR and IFF_MULTI_QUEUE
    fcntl.ioctl(queue, 0x400454ca, struct.pack('16sH22x', sys.argv[1].encode(), 0x5102))
    os.dup2(queue, 50 + number, inheritable=True)
    os.close(queue)
os.execv(sys.argv[3], sys.argv[3:])
";

#[test]
fn as_many_descriptors_of_a_tap_are_as_many_pairs_of_queues() {
    let (cells, images) = (Cells::new(), Images::new());
    let tap = Tap::new(56, &["multi_queue"]);
    let flags = [images.flag("kernel", ":ro"), images.flag("initrd", ":ro")];
    let flags = [&flags[0], &flags[1], "--fd=a=50", "--fd=b=51"];
    let jailer = cells.jailer(&flags);
    let mut command = Command::new("python3");
    command.args(["-c", WITH_TAP, &tap.name(), "2"]).arg(jailer.get_program()).args(jailer.get_args());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut vmm = Vmm { child: process::spawn_bound(&mut command, Vec::new()).unwrap() };
    let mut console = vmm.console();
    let mut api = cells.client();
    let put = |names: &str| {
        let host_dev_name = names.into();
        Request::PutNetworkInterface(NetworkInterface {
            host_dev_name,
            queue_pairs: Some(2),
            ..tap.interface()
        })
    };
    let error = api.apply(&put("fd:a")).unwrap_err().to_string();
    assert!(error.contains("names 1 descriptors, and `queue_pairs` is 2"), "{error}");
    let setup = Setup { vcpus: 2, kernel: Kernel::Path("fd:kernel".into()), ..Setup::default() };
    for mut request in setup.requests().into_iter().chain([put("fd:a,fd:b")]) {
        if let Request::PutBootSource(boot) = &mut request {
            boot.initrd_path = Some("fd:initrd".into());
        }
        api.apply(&request).unwrap();
    }
    api.apply(&Request::Action(ActionType::InstanceStart)).unwrap();
    console.wait_for("# ", limits::BOOT);
    let mut run = |command: &str| {
        let (text, code) = shell(&mut console, command);
        assert_eq!(code, 0, "{command}: {text}");
        text
    };
    assert_eq!(run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l"), "2\n");
    run(&format!("ip link set eth0 up; ip address add {}/24 dev eth0", tap.guest()));
    // Many connections, so that each queue has some of them, and both ways.
    let listener = TcpListener::bind((tap.host(), 4000)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut heard = Vec::new();
                (&stream).read_to_end(&mut heard)?;
                (&stream).write_all(&heard)
            });
        }
    });
    run("head -c 200000 /dev/urandom > /run/words");
    run(&format!(
        "for n in $(seq 16); do (nc {} 4000 < /run/words > /run/heard.$n; touch /run/done.$n) & done; \
         until [ $(ls /run/done.* 2> /dev/null | wc -l) = 16 ]; do sleep 0.1; done",
        tap.host()
    ));
    run("for n in $(seq 16); do cmp /run/words /run/heard.$n || exit 1; done");
    for queue in ["input.0", "input.1", "output.0", "output.1"] {
        let count = run(&format!("awk '/virtio[0-9]+-{queue}/ {{ print $2 + $3 }}' /proc/interrupts"));
        assert!(count.trim().parse::<u64>().unwrap() > 0, "{queue} has seen nothing: {count}");
    }
    // What the host begins comes by either queue, and the kernel has not heard by which the guest would answer.
    run(
        "(nc -ll -p 4001 -e echo hello > /dev/null 2>&1 &); until netstat -ltn | grep -q 4001; do sleep 0.1; done",
    );
    let guest = SocketAddr::new(tap.guest().parse().unwrap(), 4001);
    for _ in 0..16 {
        let mut heard = String::new();
        let mut stream = TcpStream::connect_timeout(&guest, limits::API).unwrap();
        stream.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "hello\n");
    }
    // The host's kernel has both.
    let queues = host("ip", &["-details", "link", "show", &tap.name()]);
    assert!(queues.contains("numqueues 2 numdisabled 0"), "{queues}");
    console.send(b"poweroff -f\n");
    assert_eq!(vmm.ended(), Ended::Code(0));
}

#[test]
fn a_file_for_reading_is_no_drive_to_write_to() {
    let (cells, images) = (Cells::new(), Images::new());
    let _vmm = cells.start(&[&images.flag("data", ":ro")]);
    let put = |name: &str| Request::PutDrive(disk_drive("data", format!("fd:{name}").into()));
    let mut api = cells.client();
    for (name, word) in [("data", "for reading only"), ("other", "these were: data")] {
        let error = api.apply(&put(name)).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("path_on_host"), "{error}");
    }
}

#[test]
fn what_cannot_be_handed_over_is_named_and_nothing_is_made() {
    let (cells, images) = (Cells::new(), Images::new());
    let refused = |flag: &str| {
        was_refused(&cells.run(&[flag]), &[&flag.replacen('=', " ", 1)]);
        assert_eq!(tree(cells.base.path()), set(&[]), "{flag}");
    };
    refused(&format!("--file=disk={}", images.0.path().display()));
    refused("--file=disk=/no/such/file");
    refused("--file=disk=/dev/null");
    refused("--fd=disk=999");
}

#[test]
fn a_vmm_is_told_only_of_descriptors_that_are_open() {
    let mut command = Command::new(berth_tests::guest::program("berth-vmm"));
    let output = output(command.args(["--fd", "disk=999"]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(153), "{said}");
    assert!(said.contains("--fd is \"disk=999\"") && said.contains("no open descriptor"), "{said}");
    assert!(!Path::new("/run/berth.socket").exists());
}
